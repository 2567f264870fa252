"""The tests work on small tensors: one thread is quickest, and keeps them out of each other's way."""

import torch

torch.set_num_threads(1)
