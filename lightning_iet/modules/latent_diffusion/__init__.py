"""The parts of fine-tuning a text-to-image model whose autoencoder and text encoders stay as they are."""
