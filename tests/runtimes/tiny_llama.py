"""A tiny Llama that has learned a text by heart, in the levels of a block type, and the GGUF file that llama.cpp's
converter would write of it.

By heart, so that the next token is never in doubt: runtimes add up in different orders and round activations, and where
two tokens are about as likely, the greedy choice between them is a matter of luck. It takes all layers: most tokens of
the text are followed by several others, so that the one before has to be looked up, and the layers that can't see it,
embedding and head, stay as they were at random.
"""

import functools
from pathlib import Path

import gguf
import torch

import askew_cuda as askew
from tests.layers.architectures import package

VOCABULARY, LENGTH, PROMPT = 64, 160, 8
SPECIAL = ("<unk>", "<s>", "</s>")
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
}  # fmt: skip


def text() -> torch.Tensor:
    """(LENGTH,) tokens, none of them special, of which the first PROMPT are given."""
    return torch.randint(len(SPECIAL), VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(0))


def llama():
    """1.3 million weights, all but 33,000 of them in linear layers of 256 or 512 inputs."""
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.requires_grad_(False)
    return model


@functools.cache
def trained(quantizer: str):
    """The model, snapped, and its optimizer."""
    model = llama()
    rules = {"re:.*_proj.weight": quantizer, "*": None}
    groups = askew.param_groups(model, rules, verbose=False)
    optimizer = askew.AskewAdamW(groups, lr=0.004, weight_decay=0.0, total_steps=200)
    tokens = text()
    for _ in range(200):
        optimizer.zero_grad()
        logits = model(tokens[None, :-1]).logits[0]
        torch.nn.functional.cross_entropy(logits, tokens[1:]).backward()
        optimizer.step()
    optimizer.finalize()
    return model, optimizer


@torch.no_grad()
def greedy(model, count: int) -> tuple[list[int], torch.Tensor]:
    """The ``count`` most likely tokens after the prompt, one after the other, and the logarithms of the probabilities
    that they were chosen by, (count, VOCABULARY) float64.
    """
    tokens, found = text()[:PROMPT].tolist(), []
    for _ in range(count):
        found.append(model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(0))
        tokens.append(int(found[-1].argmax()))
    return tokens[PROMPT:], torch.stack(found)


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp's converter leaves them: what is rotated together lies side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def names_in_file(model) -> dict[str, str]:
    """From names of the model to those that the converter gives."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    return {name: table.get_name(name, try_suffixes=(".weight",)) for name in model.state_dict()}


def write_template(model, path: Path) -> None:
    """What convert_hf_to_gguf.py --outtype f32 writes of the model, with a vocabulary of its own."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.NORMAL] * (VOCABULARY - len(SPECIAL))
    writer.add_token_list([*SPECIAL, *(f"\u2581t{number}" for number in range(len(SPECIAL), VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    names = names_in_file(model)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        turned = next((in_pairs(tensor, count) for end, count in heads.items() if name.endswith(end)), tensor)
        writer.add_tensor(names[name], turned.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
