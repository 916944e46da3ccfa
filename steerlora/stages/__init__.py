"""Every stage, one file each: how its artifact is built, and which steps ``stage=<name>`` means."""
