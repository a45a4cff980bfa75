"""What PyTorch did to the model, dissolved into one record per weight."""

__all__ = ()
