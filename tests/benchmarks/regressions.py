"""Small regressions that methods of the accuracy table train on, and the rules that they train by."""

import torch
from torch import nn

from benchmarks.accuracy.methods.method import Base, Method

SGD, ADAMW = Base("sgd", 0.05, weight_decay=1e-3), Base("adamw", 0.01, weight_decay=0.1, betas=(0.9, 0.95))
STEPS = 20


class Regressions:
    """S small regressions with one hidden layer, weights stacked; network i is that of seed ``seeds[i]``."""

    def __init__(self, seeds: list[int]):
        drawn = []
        for seed in seeds:
            torch.manual_seed(seed)
            one, two = nn.Linear(6, 8), nn.Linear(8, 4)
            drawn.append((one.weight, two.weight, one.bias, two.bias, torch.randn(16, 6), torch.randn(16, 4)))
        *parameters, self.x, self.y = (
            torch.stack([tensor.detach() for tensor in each]) for each in zip(*drawn, strict=True)
        )
        parameters = [nn.Parameter(each) for each in parameters]
        self.quantized, self.rest = parameters[:2], parameters[2:]

    def loss(self, run):
        x = self.x
        for k, (weight, bias) in enumerate(zip(self.quantized, self.rest, strict=True)):
            x = torch.baddbmm(bias.unsqueeze(1), run.input(x), run.weight(weight).transpose(1, 2))
            x = run.output(x)
            x = x.relu() if k == 0 else x
        return (x - self.y).square().mean((1, 2))

    def train(
        self, method: Method, width: str, base=SGD, knob=None, steps=STEPS, pretrained=False, granularity="tensor"
    ):
        knob = method.knobs[-1] if knob is None else knob
        settings = {"total_steps": steps, "pretrained": pretrained, "granularity": granularity}
        run = method.begin(self.quantized, self.rest, base, width, knob, **settings)
        for _ in range(steps):
            run.optimizer.zero_grad()
            self.loss(run).sum().backward()
            run.optimizer.step()
            run.stepped()
        run.finish()
        return run
