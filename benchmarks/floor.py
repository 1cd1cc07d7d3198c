"""The floor: bare torch and peft on the diffusers transformer; precomputed inputs, forward, backward, AdamW."""

from __future__ import annotations

from pathlib import Path

import torch
from make_models import DATA, SIZES
from measure import METER, Case

LORA_TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
"""Every attention and feed-forward layer of every block; both contestants get this expression."""
NUM_ITEMS = 20


def load_transformer(case: Case) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    network = FluxTransformer2DModel.from_pretrained(DATA / "flux" / "transformer", torch_dtype=torch.bfloat16)
    network.requires_grad_(False)
    config = LoraConfig(r=case.lora_rank, lora_alpha=case.lora_rank, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if case.use_gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def run(case: Case) -> None:
    torch.manual_seed(0)
    network = load_transformer(case)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    side, batch_size, dtype = case.resolution // 16, case.batch_size, torch.bfloat16
    latents = [torch.randn(batch_size, side * side, 64).to(dtype) for _ in range(NUM_ITEMS)]
    embeds = [torch.randn(batch_size, case.num_text_tokens, SIZES.t5_dim).to(dtype) for _ in range(NUM_ITEMS)]
    pooled = [torch.randn(batch_size, SIZES.clip_dim).to(dtype) for _ in range(NUM_ITEMS)]
    grid = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3).to(dtype)
    text_ids = torch.zeros(case.num_text_tokens, 3, dtype=dtype)
    for step in range(case.num_steps):
        clean = latents[step % NUM_ITEMS]
        noise = torch.randn_like(clean)
        sigmas = torch.rand(batch_size).to(dtype)
        blend = sigmas[:, None, None]
        noise_pred = network(
            hidden_states=(1 - blend) * clean + blend * noise, timestep=sigmas,
            guidance=torch.full((batch_size,), 1.0, dtype=dtype), pooled_projections=pooled[step % NUM_ITEMS],
            encoder_hidden_states=embeds[step % NUM_ITEMS], txt_ids=text_ids, img_ids=image_ids, return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(noise_pred.float(), (noise - clean).float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    save_lora(network, Path(case.output))
    METER.extra["final loss"] = loss.item()


def save_lora(network: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in network.named_parameters() if p.requires_grad}
    save_file(trained, folder / "lora.safetensors")
