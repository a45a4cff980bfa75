"""The whole script: torchrun --standalone --nproc-per-node 2 launch/minimal_fsdp2.py"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from dist_ema import EMA

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, device = dist.get_rank(), torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)

torch.manual_seed(0)  # all ranks start from the same weights
layers = torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
model = torch.nn.Sequential(*layers).to(device)
fully_shard(model)  # each rank keeps half of every weight
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
ema = EMA(model, decay=0.98)  # after wrapping, before training
ema.attach(optimizer)  # one update after every optimizer step

torch.manual_seed(rank)  # from here on each rank draws its own data
for _ in range(300):
    x = torch.randn(16, 8, device=device)
    noisy = x.sum(1, keepdim=True) + torch.randn(16, 1, device=device)
    (model(x) - noisy).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

x = torch.randn(1000, 8, device=device)
with torch.no_grad():
    live = (model(x) - x.sum(1, keepdim=True)).square().mean().item()
    with ema.swap():  # on every rank: the model is the average in here
        average = (model(x) - x.sum(1, keepdim=True)).square().mean().item()
print(f"rank {rank}: error of the live weights {live:.3f}, of the average {average:.3f}")

ema.save("runs/minimal/ema-000300")  # to resume from, with ema.load(...)
ema.export("runs/minimal/model.safetensors")  # to ship
dist.destroy_process_group()
