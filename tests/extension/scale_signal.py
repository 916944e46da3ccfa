from steerlora.methods.interventions import intervention
from steerlora.methods.routed_lora.interventions import Intervention


@intervention("scale_signal")
class ScaleSignal(Intervention):
    """Every active latent at a tenth of its value."""

    def features(self, features, stream, counted, site):
        return features._replace(values=features.values / 10)
