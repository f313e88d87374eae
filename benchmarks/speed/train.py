"""What does a training step cost?    python -m benchmarks.speed.train [--full] [--save [FOLDER]]

Forward pass, loss, backward pass and optimizer of an MLP, a convolutional network and a transformer, on random data:
torch's fused SGD and AdamW, AskewSGD and AskewAdamW, torch's fake-quantize operator as a straight-through estimator,
torchao's PARQ. 4 bit, all threads.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import askew_cuda as askew
from benchmarks import machine
from benchmarks.speed import harness, script, workloads
from benchmarks.speed.harness import Variant
from benchmarks.speed.peers import installed, straight_through
from benchmarks.speed.section import Section


class Block(nn.Module):
    """Attention and MLP of a small transformer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-1024-1024-10, batch 128: network, inputs, labels."""
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, torch.randn(128, 784), torch.randint(0, 10, (128,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """Six 3x3 convolutions of 32 to 128 channels with BatchNorm, images of 32 x 32, batch 32."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return model, torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """Four blocks of width 256, 1,024 tokens of 256 kinds, length 128, batch 8."""
    blocks = [Block(256, 4) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(256, 256), *blocks, nn.LayerNorm(256), nn.Linear(256, 256), nn.Flatten(0, 1))
    tokens = torch.randint(0, 256, (8, 129))
    return model, tokens[:, :-1], tokens[:, 1:].reshape(-1)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "MLP": mlp,
    "CNN": cnn,
    "transformer": transformer,
}
RULES = {
    "SGD": (torch.optim.SGD, askew.AskewSGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, askew.AskewAdamW, {"lr": 1e-4}),
}


def training_step(
    network: str, device: torch.device, prepare: Callable[[nn.Module], torch.optim.Optimizer]
) -> Callable[[], None]:
    """The step of a fresh network whose optimizer ``prepare`` makes; twice made already."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[network]()
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = prepare(model)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    step()
    return step


def ways_of_training(rule: str) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Each way of training: from a network to its optimizer."""
    theirs, ours, keywords = RULES[rule]

    def askewed(model: nn.Module) -> torch.optim.Optimizer:
        groups = askew.param_groups(model, {"re:.*": "4bit"}, verbose=False, epsilon=0.5)
        return ours(groups, **keywords)

    return {
        f"torch {rule}(fused=True)": lambda model: theirs(model.parameters(), fused=True, **keywords),
        ours.__name__: askewed,
        f"STE, fake-quantize, fused {rule}": lambda model: theirs(
            straight_through.apply(model).parameters(), fused=True, **keywords
        ),
        f"torchao PARQ, fused {rule}": lambda model: installed.parq(list(model.parameters()), theirs, **keywords),
    }


def measure(effort: script.Effort) -> Iterator[Section]:
    harness.pin(machine.cores())
    for network in NETWORKS:
        for rule in RULES:
            variants, absent = {}, {}
            for name, prepare in ways_of_training(rule).items():
                step, why = workloads.attempt(name, functools.partial(training_step, network, effort.device, prepare))
                if step is None:
                    absent[name] = why
                else:
                    variants[name] = Variant(step)
            baseline = f"torch {rule}(fused=True)"
            timings = harness.compare(
                variants, baseline=baseline, rounds=effort.pick(5, 31), clock=harness.wall_seconds
            )
            weights = sum(weight.numel() for weight in NETWORKS[network]()[0].parameters())
            about = {"network": network, "rule": rule, "weights": weights, "threads": torch.get_num_threads()}
            yield Section(f"A training step of the {network}", about, baseline, timings, absent)


if __name__ == "__main__":
    script.main("train", measure, __doc__)
