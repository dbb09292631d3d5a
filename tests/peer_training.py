"""Run where `adapters` is installed: training steps of both libraries under one seed."""

import copy

import adapters
import torch
from adapters.composition import Fuse as PeerFuse
from adapters.composition import Stack as PeerStack
from tiny import SIZES
from transformers import BertConfig, BertModel

import fastfusion
from fastfusion.composition import Fuse, Stack

STEPS = 4


def pair(adapter_config, fusion_config, attention_dropout):
    """The same randomised model in both libraries."""
    config = BertConfig(
        # the draw matters: a ReLU that rounding switches costs more than the tolerances in fp32
        **{**SIZES, "max_position_embeddings": 512},
        attention_probs_dropout_prob=attention_dropout,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    ours = BertModel(config)
    peer = copy.deepcopy(ours)
    fastfusion.init(ours)
    adapters.init(peer)
    for name in "abc":
        ours.add_adapter(name, adapter_config)
        peer.add_adapter(name, config=adapter_config)
    ours.add_adapter_fusion(list("abc"), fusion_config)
    peer.add_adapter_fusion(list("abc"), config=fusion_config)
    for name, parameter in ours.named_parameters():
        if "adapter" in name or "LayerNorm" in name:
            torch.nn.init.normal_(parameter, mean=float("LayerNorm" in name), std=0.3)
    # adapters lists the word embeddings a second time, under prompt_tuning
    missing, unexpected = peer.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("prompt_tuning.") for name in missing)
    return ours, peer


def train(model, mode, fuse, stack, length):
    """Losses and final weights of a few steps of SGD, dropout on, the regulariser in the loss."""
    setup = stack("c", fuse("a", "b", "c")) if mode == "stack" else fuse("a", "b", "c")
    if mode == "adapter":
        model.train_adapter("a")
    else:
        model.train_adapter_fusion(setup, unfreeze_adapters=mode == "stack")
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        ids = torch.randint(0, 60, (4, length))
        loss = model(ids)[0].square().mean()
        regularization = model.get_fusion_regularization_loss()
        if regularization is not None:
            loss = loss + regularization
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), {n: p.detach() for n, p in model.named_parameters()}


def main():
    fusions = ({}, {"query_before_ln": True}, {"temperature": True}, {"value": False})
    for adapter_config in ("seq_bn[reduction_factor=4]", "double_seq_bn[reduction_factor=4]"):
        for fusion_config in fusions:
            for mode in ("fusion", "stack", "adapter"):
                for length in (3, 12):  # the factored form (T < D) and the absorbed one
                    full = {**fastfusion.AdapterFusionConfig().to_dict(), **fusion_config}
                    ours, peer = pair(adapter_config, full, attention_dropout=0.2)
                    actual, weights = train(ours, mode, Fuse, Stack, length)
                    expected, peer_weights = train(peer, mode, PeerFuse, PeerStack, length)
                    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
                    for name, weight in weights.items():
                        # fp32 gradients of four steps, summed up with momentum
                        torch.testing.assert_close(weight, peer_weights[name], rtol=1e-4, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main()
