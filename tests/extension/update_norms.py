from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from safetensors.torch import load_file

from steerlora.engine.steps import Step, stage
from steerlora.methods.saving import WEIGHTS
from steerlora.stages import adapter_training


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    methods: tuple[str, ...]


def steps(config, variant):
    """One table of all the methods in ``stage.settings.methods``."""
    names = tuple(config.stage.settings["methods"])
    trained = tuple(adapter_training.step(variant(f"method={name}")) for name in names)
    settings = NormSettings(methods=names)
    return [Step("update_norms", settings, {"adapters": trained}, "update_norms")]


@stage("update_norms", 1, steps=steps)
def build(context):
    norms = {}
    for name, artifact in zip(context.config.methods, context.inputs["adapters"], strict=True):
        weights = load_file(artifact / adapter_training.FOLDER / WEIGHTS).values()
        norms[name] = sum(float(weight.float().square().sum()) for weight in weights) ** 0.5
    table = pd.Series(norms, name="norm")
    table.to_csv(context.directory / "norms.csv")
    table.plot.barh()
    plt.savefig(context.directory / "norms.png")
    plt.close()
    return norms
