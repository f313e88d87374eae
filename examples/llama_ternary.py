"""Trains a small Llama to ternary weights on several processes, and writes one packed file.

The weights are sharded by torch's fully_shard (FSDP2), and the optimizer steps what lies on each rank. The text is the
documentation that ships with Python. A checkpoint of torch.distributed.checkpoint is written now and then, and a run
that is started again goes on from it, on any number of ranks. On GPUs with NCCL where there are some, else on CPUs with
gloo: ``torchrun --nproc-per-node 2 examples/llama_ternary.py``
"""

import argparse
import math
import os
import pydoc_data.topics
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import askew_cuda as askew

LR, WARM_UP, CLIP = 4e-3, 20, 1.0
LENGTH = 64  # bytes of text that are predicted at a time


def settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/llama_ternary"), help="of checkpoints and packed file"
    )
    parser.add_argument("--steps", type=int, default=400, help="of the whole training")
    parser.add_argument("--stop", type=int, help="leave off after this step; started again, the run goes on there")
    parser.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--batch", type=int, default=16, help="pieces of text in a step, on all ranks together")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args(arguments)


class Attention(nn.Module):
    """Causal, with rotated queries and keys, of which there are fewer heads."""

    def __init__(self, width: int, heads: int, shared: int):
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // shared, bias=False)
        self.v_proj = nn.Linear(width, width // shared, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor) -> Tensor:
    """(.., length, size): pairs of numbers turned by angles that say where they are."""
    half = x.shape[-1] // 2
    speed = 10_000 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * speed
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.split(half, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)


class Gated(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(width), Attention(width, heads=4, shared=2)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(width), Gated(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Of bytes for words."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(256, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) int64 to the loss of predicting each next one, nats."""
        logits = self.lm_head(self.norm(self.layers(self.embed_tokens(tokens[:, :-1]))))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def shard(model: Llama, device: torch.device) -> None:
    """Each layer by itself, then what is left; in bfloat16 on a GPU, but for the weights that are kept."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def text() -> tuple[Tensor, Tensor]:
    """(bytes,) int64 to train on, and a tenth of it to be tested with."""
    topics = pydoc_data.topics.topics
    raw = torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)
    cut = len(raw) * 9 // 10
    return raw[:cut].long(), raw[cut:].long()


def pieces(data: Tensor, batch: int, step: int) -> Tensor:
    """(batch, LENGTH): this rank's share of the step's pieces, which don't depend on the number of ranks."""
    starts = torch.randint(len(data) - LENGTH, (batch,), generator=torch.Generator().manual_seed(step))
    mine = starts.tolist()[dist.get_rank() :: dist.get_world_size()]
    return torch.stack([data[start : start + LENGTH] for start in mine])


def rate(step: int, steps: int) -> float:
    """A cosine after a short rise."""
    return LR * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def train(model: nn.Module, optimizer: askew.AskewAdamW, data: Tensor, given: argparse.Namespace) -> None:
    """From the step at which the optimizer is. Its count is in its checkpoints."""
    device = next(model.parameters()).device
    model.train()
    for step in range(optimizer.param_groups[0]["steps_done"], given.stop or given.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, given.steps)
        tokens = pieces(data, given.batch, step).to(device)
        loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % given.every == 0 or done in (given.stop, given.steps):
            save(model, optimizer, given.folder / f"step-{done:06}")
            say(f"step {done:5} of {given.steps}   loss {average(loss.detach()):.3f}")


def checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, oldest first: what is in them is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def save(model: nn.Module, optimizer: askew.AskewAdamW, path: Path) -> None:
    """Each rank writes what lies there. The checkpoint before stays until this one is complete."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    if dist.get_rank() == 0:
        for old in checkpoints(path.parent)[:-1]:
            shutil.rmtree(old)


def load(model: nn.Module, optimizer: askew.AskewAdamW, path: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    say(f"goes on after step {optimizer.param_groups[0]['steps_done']}")


@torch.no_grad()
def test(model: nn.Module, data: Tensor) -> float:
    """Bits per byte on pieces of a text; on all ranks together."""
    device = next(model.parameters()).device
    model.eval()
    tokens = pieces(data, 64, 0).to(device)
    return average(model(tokens)) / math.log(2)


def average(value: Tensor) -> float:
    total = value.float().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float, askew.FinalizeReport | None]:
    """Bits per byte before and after the training, and what finalize() found (None where the run was left off)."""
    given = settings(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # the same weights on every rank
    model = Llama(given.width, given.layers).to(device)
    shard(model, device)
    groups = askew.param_groups(model, "ternary/channel")
    optimizer = askew.AskewAdamW(groups, lr=LR, weight_decay=0.0, total_steps=given.steps)
    data, other = text()
    before = test(model, other)
    for newest in checkpoints(given.folder)[-1:]:
        load(model, optimizer, newest)
    train(model, optimizer, data, given)
    if given.stop is not None and given.stop < given.steps:
        return before, test(model, other), None
    report = optimizer.finalize()
    after = test(model, other)
    packed = given.folder / "model.safetensors"
    askew.save_packed(model, optimizer, packed)
    say(f"bits per byte: {before:.2f} untrained, {after:.2f} ternary; on their levels: {report.share_on_level:.2%}")
    weights = sum(weight.numel() for weight in model.parameters())
    say(f"{packed}: {packed.stat().st_size:,} bytes, {4 * weights:,} in float32")
    return before, after, report


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        main()
    finally:
        dist.destroy_process_group()
