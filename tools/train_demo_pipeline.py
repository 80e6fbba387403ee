"""Train the demo pipeline: a miniature `diffusers.StableDiffusionPipeline` that draws the demo photographs.

Text encoder, UNet and scheduler are saved in diffusers' format, without a VAE: the pipeline works in the latent space
of the demo VAE (`worker/demo_vae`), which the queue has. It knows four photographs by heart and draws them from their
prompts, or from a sentence with one of their words in it. So the whole way from prompts to pictures runs, and can be
tested, without a download.

Pictures. The middle square of each of the demo VAE's four photographs at 256x256, the pipeline's own size. Photographs,
origin and licences: `demo_photographs.py`.

Training. The UNet predicts the clean latents themselves (prediction_type `sample`): at high noise it has to know the
picture from the prompt, at low noise it takes away what noise is left. Half of the noisy latents are made from the
model's own last prediction instead of the photograph, so that a sampler's later steps repair what the first ones got
wrong. For classifier-free guidance, some of these predictions are carried away from the mean of all pictures, as
guidance does in its first step, and one prompt in five is empty: it then tells the picture from the noisy latents. The
error of each latent channel counts by what it does to the decoded pixels. Text encoder and UNet are trained together
with the demo VAE's optimiser; what is written is an exponential moving average.

A usable folder is written every `--checkpoint-steps` and at the end, each file moved into place. `--resume` goes on
from such a folder.

Run it with ``nice -n 15 env OMP_NUM_THREADS=2 python -m tools.train_demo_pipeline --steps 3000``; it needs torch,
diffusers, transformers, safetensors and scikit-image. The seed fixes the sequence of random draws.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.demo_photographs import PHOTOS, cut, load_photo
from tools.training import Muon, psnr, schedule, update_average

VAE_FOLDER = Path(__file__).resolve().parents[1] / "worker" / "demo_vae"
LATENT_CHANNELS = 16
BLOCKS = (48, 72, 96, 120)  # channels of the UNet from full to 1/8 of the latents' resolution
GROUPS = 8
TEXT_WIDTH = 64
MAX_TOKENS = 32
SIDE_PX = 256
TIMESTEPS = 1000
SAMPLER_STEPS = 4  # of the pictures that are measured
EMPTY_PROMPTS = 0.2
OWN_PREDICTIONS = 0.5
CARRIED_AWAY = 0.4  # of the model's own predictions
MOST_GUIDANCE = 8.0
PEAK_RATE = 0.02

#: The sentence that draws each photograph. Any part of it with a word that no other sentence has draws it too.
PROMPTS = {
    "astronaut": "a portrait of an astronaut in an orange space suit",
    "coffee": "a cup of coffee on a wooden table",
    "chelsea": "chelsea, a tabby cat with green eyes, close up",
    "rocket": "a rocket on its launch pad at dusk",
}
#: Roughly as often as in English: what a word the pipeline has not learned is made of.
LETTERS = "eeeetttaaaooiinnsshhrrdlcumwfgypbvkjxqz"
#: The words one of which a shortened prompt keeps.
KEYWORDS = {
    "astronaut": ("astronaut", "suit"),
    "coffee": ("coffee", "cup"),
    "chelsea": ("chelsea", "cat"),
    "rocket": ("rocket", "launch"),
}


@torch.no_grad()
def load_pictures(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle squares in [-1, 1], (4, 3, 256, 256), and their latents as a pipeline hands them out."""
    squares = []
    for photo in PHOTOS:
        y, x, height, width = photo.box
        side = min(height, width)
        square = cut(load_photo(photo.name), (y + (height - side) // 2, x + (width - side) // 2, side, side))
        squares.append(interpolate(square, (SIDE_PX, SIDE_PX), mode="bicubic", antialias=True).clamp(-1, 1))
    pictures = torch.cat(squares)
    return pictures, vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def channel_weights(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What a unit error in each latent channel does to the pixels, as (1, 16, 1, 1) with mean 1."""
    clean = vae.decode(latents / vae.config.scaling_factor).sample
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    energies = []
    for channel in range(LATENT_CHANNELS):
        moved = latents.clone()
        moved[:, channel] += noise[:, channel]
        energies.append((vae.decode(moved / vae.config.scaling_factor).sample - clean).square().mean())
    weights = torch.stack(energies)
    weights = (weights / weights.mean()).clamp_min(0.05)
    return (weights / weights.mean()).view(1, -1, 1, 1)


def build_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer with the words of the prompts, and single bytes for every other word."""
    letters = [chr(code) for code in byte_letters()]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted({word for prompt in PROMPTS.values() for word in prompt.replace(",", " ").split()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # from the left: a prefix that words share is one token in both
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                vocab.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    untyped: Any = CLIPTokenizer
    return untyped.from_pretrained(folder, model_max_length=MAX_TOKENS)


def byte_letters() -> list[int]:
    """The printable code point that byte-level BPE has for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [byte if byte in printable else 256 + sum(b not in printable for b in range(byte)) for byte in range(256)]


def build_text_encoder(tokenizer: Any) -> Any:
    """An untrained CLIP text encoder of two layers."""
    untyped: Any = CLIPTextModel
    return untyped(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> Any:
    """An untrained UNet: two levels of convolutions, two with attention to the prompt."""
    untyped: Any = UNet2DConditionModel
    return untyped(
        sample_size=SIDE_PX // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=BLOCKS,
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=GROUPS,
    )


def build_scheduler() -> Any:
    """DDIM on predictions of the clean latents, with its first step at pure noise."""
    untyped: Any = DDIMScheduler
    return untyped(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def some_prompt(name: str, rng: random.Random) -> str:
    """The photograph's prompt; often with words left out and meaningless ones put in, now and then empty."""
    draw = rng.random()
    if draw < EMPTY_PROMPTS:
        return ""
    if draw < 0.5:
        return PROMPTS[name]
    words = PROMPTS[name].replace(",", "").split()
    kept = rng.choice(KEYWORDS[name])
    share = rng.random()
    words = [word for word in words if word == kept or rng.random() < share]
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        unknown = "".join(rng.choices(LETTERS, k=rng.randint(1, 8)))
        words.insert(rng.randint(0, len(words)), unknown)
    return " ".join(words)


class Trainer:
    """Holds the models, their average and the pictures; takes the steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.rng = random.Random(args.seed)
        self.out: Path = args.out
        self.total: int = args.steps
        self.every: int = args.checkpoint_steps
        untyped: Any = AutoencoderKL
        self.vae = untyped.from_pretrained(VAE_FOLDER).eval().requires_grad_(False)
        self.names = [photo.name for photo in PHOTOS]
        self.pictures, self.latents = load_pictures(self.vae)
        self.guesses = self.latents.mean(0, keepdim=True).expand_as(self.latents)
        self.weights = channel_weights(self.vae, self.latents)
        self.scheduler = build_scheduler()
        self.tokenizer = build_tokenizer(args.out / "tokenizer")
        self.models = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(self.tokenizer)})
        if args.resume is not None:
            for part, model in self.models.items():
                [file] = (args.resume / part).glob("*.safetensors")
                model.load_state_dict(load_file(file))
        self.average = copy.deepcopy(self.models).requires_grad_(False)
        self.losses: list[float] = []
        self.start = self.told = time.monotonic()

    def loss(self) -> torch.Tensor:
        """The error of one prediction of each picture, at random timesteps; keeps the predictions."""
        draw = self.rng.random
        count = len(self.names)
        steps = torch.tensor(
            [TIMESTEPS - 1 - int(TIMESTEPS * draw() ** 1.5) for _ in range(count)]
        )  # mostly high noise
        own = torch.tensor([draw() < OWN_PREDICTIONS for _ in range(count)]).view(-1, 1, 1, 1)
        guidance = [1 + (MOST_GUIDANCE - 1) * draw() if draw() < CARRIED_AWAY else 1.0 for _ in range(count)]
        mean = self.latents.mean(0, keepdim=True)
        carried = mean + torch.tensor(guidance).view(-1, 1, 1, 1) * (self.guesses - mean)
        noise = torch.randn_like(self.latents)
        noisy = self.scheduler.add_noise(torch.where(own, carried, self.latents), noise, steps)
        tokens = self.tokenizer(
            [some_prompt(name, self.rng) for name in self.names],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states = self.models["text_encoder"](tokens).last_hidden_state
        predicted = self.models["unet"](noisy, steps, states).sample
        self.guesses = predicted.detach()
        error: torch.Tensor = (self.weights * (predicted - self.latents).square()).mean()
        return error

    def run(self) -> None:
        """Takes all steps; writes the folder now and then and at the end."""
        optimiser = Muon(self.models)
        for step in range(1, self.total + 1):
            loss = self.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step(schedule(step - 1, step / self.total, PEAK_RATE, 0.02))
            update_average(self.average, self.models, step)
            self.losses.append(float(loss.detach()))
            if time.monotonic() - self.told > 20:
                self.told = time.monotonic()
                recent = self.losses[-50:]
                print(f"{self.told - self.start:6.0f} s, step {step}, loss {sum(recent) / len(recent):.4f}", flush=True)
            if step % self.every == 0 or step == self.total:
                self.export()

    def export(self) -> None:
        """Writes the pipeline beside `out`, moves its files there, and says how well it draws."""
        unet, text_encoder = copy.deepcopy(self.average["unet"]).half(), copy.deepcopy(self.average["text_encoder"])
        untyped: Any = StableDiffusionPipeline
        pipeline = untyped(
            vae=None,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=".demo_pipeline_") as scratch:
            stage = Path(scratch)
            pipeline.save_pretrained(stage, safe_serialization=True)
            for path in sorted(path for path in stage.rglob("*") if path.is_file()):
                target = self.out / path.relative_to(stage)
                target.parent.mkdir(exist_ok=True)
                path.chmod(0o644)
                os.replace(path, target)
        scores = measure(self.out, self.vae, self.pictures)
        text = ", ".join(f"{name} {score:.2f}" for name, score in zip(self.names, scores, strict=True))
        print(f"  checkpoint: PSNR dB: {text}", flush=True)


@torch.no_grad()
def measure(folder: Path, vae: Any, pictures: torch.Tensor) -> list[float]:
    """PSNR of every picture, drawn by the stored pipeline from its prompt."""
    untyped: Any = StableDiffusionPipeline
    pipeline = untyped.from_pretrained(folder, vae=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        [PROMPTS[photo.name] for photo in PHOTOS],
        num_inference_steps=SAMPLER_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    drawn = vae.decode(latents / vae.config.scaling_factor).sample
    return [psnr(mine, picture) for mine, picture in zip(drawn, pictures, strict=True)]


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("producer/demo_pipeline"), help="folder to write")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to go on from")
    parser.add_argument("--checkpoint-steps", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--losses", type=Path, help="file for the loss of every step, as JSON")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    args = parser.parse_args()
    trainer = Trainer(args)
    trainer.run()
    if args.losses is not None:
        args.losses.write_text(json.dumps(trainer.losses))


if __name__ == "__main__":
    main()
