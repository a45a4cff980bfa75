"""One thread per process: several of them share the machine."""

import torch

torch.set_num_threads(1)
