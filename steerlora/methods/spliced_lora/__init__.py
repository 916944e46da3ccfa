"""LoRA around frozen sparse autoencoders: the model goes on from their reconstructions."""
