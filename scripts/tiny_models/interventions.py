"""Golden numbers of interventions, computed in PyTorch with forward hooks.

The hooks are independent of the Rust program: a neuron is an element of the down projection's input, and a
direction is added to a block's output. Every edit applies to every token.
"""

import numpy as np
import torch

TEXTS = ["The cat sleeps", "Das Wetter ist", "猫在家"]
N_STEPS = 5
# Rows of logits kept for each case.
N_ROWS = 4
# Every intervention must move some logit by at least this much. A smaller effect would test nothing.
MIN_EFFECT = 0.5


def edited(values: torch.Tensor, operation: dict) -> torch.Tensor:
    """Applies an operation to any numbers: activations or components along a direction."""
    (name, argument), = operation.items()
    match name:
        case "offset":
            return values + argument
        case "assign":
            return torch.full_like(values, argument)
        case "scale":
            return values * argument
        case "clamp":
            return values.clamp(argument["min"], argument["max"])
    raise ValueError(name)


def neuron(layer: int, index: int, coefficient: float = 1.0, **operation) -> dict:
    return {"layer": layer, "coefficient": coefficient, "neuron": index, "operation": operation}


def along(layer: int, vector: list[float], coefficient: float = 1.0, **operation) -> dict:
    return {"layer": layer, "coefficient": coefficient, "direction": vector, "operation": operation}


def cases(n_layer: int, n_ff: int, n_embd: int) -> dict[str, list[dict]]:
    """Edits by name. Neurons and directions are chosen all over the model by fixed arithmetic."""
    last = n_layer - 1
    random = np.random.Generator(np.random.PCG64(7))
    directions = [[round(float(x), 3) for x in random.standard_normal(n_embd)] for _ in range(3)]
    some = [(0, 3), (0, n_ff - 1), (last, 7), (last, n_ff // 2), (n_layer // 2, 40)]
    return {
        "offset": [neuron(il, i, offset=x) for (il, i), x in zip(some, [3.0, -2.0, 4.0, -3.0, 2.0])],
        "offset_without_layer_0": [neuron(il, i, offset=x) for (il, i), x in zip(some[2:4], [4.0, -3.0])],
        "assign": [neuron(0, 5, assign=3.0), neuron(last, 9, assign=-4.0)],
        "assign_half": [neuron(0, 5, 0.5, assign=6.0), neuron(last, 9, 0.5, assign=-8.0)],
        "scale": [neuron(il, i, scale=2.5) for il in range(n_layer) for i in range(0, n_ff, 4)],
        "zero": [neuron(il, i, scale=0.0) for il in range(n_layer) for i in range(1, n_ff, 3)],
        "clamp": [neuron(il, i, clamp={"min": 0.5, "max": 0.75}) for il in range(n_layer) for i in range(0, n_ff, 8)],
        "direction_offset": [along(last, directions[0], offset=-1.0)],
        "direction_offset_layer_0": [along(0, directions[1], 0.5, offset=2.0)],
        "project": [along(0, directions[0], assign=0.0), along(last, directions[2], assign=0.0)],
        # The order matters: offset, then clamp, then scale the neuron; clamp the component, then offset.
        "mixed": [
            neuron(last, 11, offset=5.0),
            neuron(last, 11, clamp={"min": -1.0, "max": 2.0}),
            neuron(last, 11, scale=-3.0),
            along(last, directions[1], clamp={"min": -0.5, "max": 0.5}),
            along(last, directions[2], offset=0.5),
            neuron(0, 2, offset=-4.0),
        ],
    }


@torch.no_grad()
def logits(arch, model: torch.nn.Module, tokens: list[int], edits: list[dict]) -> np.ndarray:
    """Logits [n_tokens, n_vocab], with hooks that apply the edits."""
    handles = []
    for il, block in enumerate(model.get_submodule(arch.blocks)):
        of_neurons = [e for e in edits if e["layer"] == il and "neuron" in e]
        of_output = [e for e in edits if e["layer"] == il and "direction" in e]
        if of_neurons:
            handles.append(block.get_submodule(arch.down).register_forward_pre_hook(
                lambda _module, args, edits=of_neurons: (change_neurons(args[0], edits),) + args[1:]))
        if of_output:
            handles.append(block.register_forward_hook(
                lambda _module, _args, out, edits=of_output:
                    (change_output(out[0], edits),) + out[1:] if isinstance(out, tuple) else change_output(out, edits)))
    try:
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
    finally:
        for handle in handles:
            handle.remove()


def change_neurons(activations: torch.Tensor, edits: list[dict]) -> torch.Tensor:
    """Applies edits to neuron activations [..., n_ff]."""
    activations = activations.clone()
    for edit in edits:
        a = activations[..., edit["neuron"]]
        activations[..., edit["neuron"]] = a + edit["coefficient"] * (edited(a, edit["operation"]) - a)
    return activations


def change_output(stream: torch.Tensor, edits: list[dict]) -> torch.Tensor:
    """Applies edits to the residual stream [..., n_embd]."""
    for edit in edits:
        vector = torch.tensor(edit["direction"])
        if "offset" in edit["operation"]:
            stream = stream + edit["coefficient"] * edit["operation"]["offset"] * vector
            continue
        unit = vector / vector.norm()
        component = stream @ unit
        change = edit["coefficient"] * (edited(component, edit["operation"]) - component)
        stream = stream + change.unsqueeze(-1) * unit
    return stream


@torch.no_grad()
def sentence_vectors(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Means over tokens [n_layer + 1, n_embd]: of the first block's input, of the residual stream after each block
    except the last, and of the output of the final norm."""
    states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack([state[0].mean(dim=0) for state in states]).float().numpy()


@torch.no_grad()
def greedy_activations(arch, model: torch.nn.Module, tokens: list[int], neurons: list[list[int]]):
    """Decodes N_STEPS tokens greedily. Returns the tokens, each token's lead over the second best, and each neuron's
    mean activation at the last position of each step."""
    tokens, n_prompt, leads, sums = list(tokens), len(tokens), [], np.zeros(len(neurons))
    for _ in range(N_STEPS):
        seen = {}
        handles = [
            block.get_submodule(arch.down).register_forward_pre_hook(
                lambda _module, args, il=il: seen.__setitem__(il, args[0].reshape(-1, args[0].shape[-1])[-1].clone()))
            for il, block in enumerate(model.get_submodule(arch.blocks))
        ]
        last = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float().numpy()
        for handle in handles:
            handle.remove()
        sums += [float(seen[il][index]) for il, index in neurons]
        second, best = np.argsort(last, kind="stable")[-2:]
        leads.append(float(last[best] - last[second]))
        tokens.append(int(best))
    return tokens[n_prompt:], leads, sums / N_STEPS
