"""What several test files share, beside the fixtures of ``conftest.py``."""
