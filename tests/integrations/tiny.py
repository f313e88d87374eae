"""A tiny language model from its config, a data set that it can learn, and a Trainer for both."""

import torch
import transformers

LENGTH, VOCABULARY = 8, 16


def language_model(seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    """Two layers of width 16; some 8,000 weights."""
    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        **{"tie_word_embeddings": False, "attn_implementation": "eager", **changes},
    )
    return transformers.LlamaForCausalLM(config)


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, modulo the vocabulary, from a random start in steps of 1 to 3."""

    def __init__(self, size: int = 64, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCABULARY, (size, 1), generator=generator)
        stride = torch.randint(1, 4, (size, 1), generator=generator)
        self.rows = (start + stride * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Endless(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __iter__(self):
        data = Counting()
        while True:
            yield from (data[index] for index in range(len(data)))


class InOrder(transformers.Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(
    folder,
    model=None,
    *,
    kind=InOrder,
    data=None,
    test=None,
    callbacks=None,
    other=None,
    arguments_kind=None,
    **arguments,
):
    """A Trainer on the CPU that writes to ``folder``, of 40 steps of 16 sequences, 4 an epoch, unless told otherwise;
    ``other`` are arguments of the Trainer itself.
    """
    arguments = {
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return kind(
        language_model() if model is None else model,
        (arguments_kind or transformers.TrainingArguments)(str(folder), **arguments),
        train_dataset=Counting() if data is None else data,
        eval_dataset=Counting(32, seed=1) if test is None else test,
        callbacks=callbacks,
        **(other or {}),
    )
