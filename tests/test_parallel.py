"""Two processes with batches of their own: what a batch of text alone takes part in, and what it leaves out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


CHILD = """
import json, sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

folder, rank, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

from conftest import IMAGE_SIZE, make_model

torch.manual_seed(0)
whole = make_model().train()
tower = whole.model.vision_tower.requires_grad_(kind == "trainable")
projector = [parameter for name, parameter in whole.named_parameters() if "projector" in name]
calls = []
tower.register_forward_hook(lambda *_: calls.append(1))
model = whole
if kind == "fully_shard":
    mesh = init_device_mesh("cpu", (2,))
    for layer in [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"]:
        fully_shard(layer, mesh=mesh)
elif kind == "FullyShardedDataParallel":
    whole.model.vision_tower = FullyShardedDataParallel(tower, device_id=torch.device("cpu"))
else:
    model = DistributedDataParallel(whole, find_unused_parameters=kind == "trainable")
ids = torch.tensor([[5, 6, 7] + [whole.config.image_token_id] * 16 * rank + [8, 9]])
images = {"pixel_values": torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)} if rank else {}
for _ in range(2):
    model(ids, labels=ids, **images).loss.backward()
print(json.dumps([len(calls), [float(parameter.grad.abs().sum()) for parameter in projector]]))
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("frozen", [0, 2]), ("trainable", [2, 2]), ("fully_shard", [2, 2]), ("FullyShardedDataParallel", [2, 2])],
)
def test_text_alone_passes_the_encoder_only_where_the_other_process_waits_for_it(tmp_path, kind, passes):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), str(rank), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], [error[-2000:] for _, error in outputs]
    results = [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]
    assert [calls for calls, _ in results] == passes
    for gradients in zip(*(gradients for _, gradients in results), strict=True):
        if kind in ("frozen", "trainable"):  # averaged by DistributedDataParallel
            assert gradients[0] == pytest.approx(gradients[1])
            assert gradients[0] > 0
