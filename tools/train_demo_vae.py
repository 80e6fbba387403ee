"""Train the demo VAE and write the latents that the demo queue decodes.

The result is a small, real ``diffusers.AutoencoderKL`` (8x spatial compression, 16 latent
channels, about 1.7 M parameters) that knows four photographs by heart, and little else. It lets
the service, its tests and its demo run a genuine VAE decode without any download.

Photographs: `demo_photographs.py` has them, with their origin and licence.

Training. The encoder does not start at random: its convolutions are set in closed form so that
it computes a whitened principal component analysis (PCA) of the 8x8 patches. Then three stages
share the steps given by ``--steps``:

1. the decoder alone, on random flipped crops of the photographs: L1, MSE and an L1 on image
   gradients;
2. encoder and decoder together on such crops, with a tiny KL weight;
3. the latents are frozen as they will be stored (float16 encoder weights, float16 latents), and
   the decoder alone goes on training with whole pictures and whole clip frames.

Convolutions are trained with Muon (momentum whose matrix is made orthogonal), everything else with
Adam, both with warm-up and cosine decay; the weights written are an exponential moving average.

A usable folder (weights, config, latents) is written every ``--checkpoint-steps`` and at the end:
first to a temporary folder beside ``--out``, then moved file by file into ``--out``. With
``--resume FOLDER`` training goes on from such a folder, with stage 3 alone.

Latents. Each ``latents/NAME.safetensors`` holds one float16 tensor ``latents``: the posterior mean
times ``scaling_factor`` (which is 1/std of all image latents), shaped (1, C, h/8, w/8), and for the
clip (1, C, F, h/8, w/8). The clip is a pan over one photograph: frame ``i`` of ``F`` is the crop
of ``height`` x ``width`` whose top left corner is

    t = i / (F - 1)
    y = floor(y0 + (y1 - y0) * t + 0.5),  x = floor(x0 + (x1 - x0) * t + 0.5)

with ``pan`` = "y0,x0,y1,x1" in the file's metadata, and every frame is encoded on its own.

Run it with ``nice -n 15 env OMP_NUM_THREADS=2 python -m tools.train_demo_vae --steps 800``; it
needs torch, diffusers, safetensors and scikit-image. The seed fixes the sequence of random draws
and the schedule follows the steps, so a second run differs by rounding alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.nn.functional import pixel_unshuffle

from tools.demo_photographs import CLIP, PHOTOS, clip_boxes, cut, load_photo
from tools.training import Muon, picture_loss, psnr, schedule, update_average

FACTOR = 8
LATENT_CHANNELS = 16
BLOCKS = (16, 24, 48, 104)  # channels from full to 1/8 resolution; decode time lies in the first two
GROUPS = 8
STAGES = (0.5, 0.8)  # stage 1 and stage 2 end at these parts of the steps
QUIET = 30.0  # constant that outweighs the picture in the encoder's last group norm
CROP_PLANS = ((128, 4), (128, 4), (192, 2), (256, 1))  # crop size, batch size


@dataclass
class Example:
    """A whole target picture (1, 3, h, w) in [-1, 1] with its frozen latents (unscaled)."""

    key: str
    target: torch.Tensor
    latents: torch.Tensor


def build_model() -> Any:
    """Return an untrained AutoencoderKL with a quiet posterior."""
    untyped: Any = AutoencoderKL
    model = untyped(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=BLOCKS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=GROUPS,
        sample_size=512,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # every residual branch starts silent
        for name, parameter in model.named_parameters():
            if ".resnets." in name and ".conv2." in name:
                parameter.zero_()
    return model.to(memory_format=torch.channels_last)


def unshuffle_rows(conv: Any, channels: int) -> None:
    """Make a stride 2 convolution move each 2x2 block of ``channels`` into 4 times as many."""
    conv.weight[: 4 * channels] = 0
    conv.bias[: 4 * channels] = 0
    for channel in range(channels):
        for index in range(4):
            conv.weight[4 * channel + index, channel, index // 2, index % 2] = 1


def identity_rows(conv: Any, channels: int, centre: int) -> None:
    """Make a convolution copy its first ``channels`` inputs."""
    conv.weight[:channels] = 0
    conv.bias[:channels] = 0
    for channel in range(channels):
        conv.weight[channel, channel, centre, centre] = 1


def patches_of(images: list[torch.Tensor], times: int) -> torch.Tensor:
    """Return all patches (n, 3 * 4**times), in the order of channels that the encoder's blocks produce."""
    rows = []
    for image in images:
        height, width = image.shape[1] // FACTOR * FACTOR, image.shape[2] // FACTOR * FACTOR
        x = cut(image, (0, 0, height, width))
        for _ in range(times):
            x = pixel_unshuffle(x, 2)
        rows.append(x[0].flatten(1).T)
    return torch.cat(rows)


def principal(data: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``count`` largest principal components as rows, and their variances."""
    values, vectors = torch.linalg.eigh(data.T.cov())
    return vectors[:, -count:].T, values[-count:]


@torch.no_grad()
def set_encoder(model: Any, images: list[torch.Tensor]) -> None:
    """Set the encoder to a whitened PCA of 8x8 patches (its residual branches are silent).

    It works in two levels: the 4x4 patches are reduced to as many principal components as the
    second block has channels, then four neighbours of those to the latents.

    The last group norm is kept from acting on the picture by a pair of large constants in each
    group, and SiLU by pairs of opposite channels: silu(a) - silu(-a) = a.
    """
    encoder, count = model.encoder, LATENT_CHANNELS
    blocks = encoder.down_blocks
    identity_rows(encoder.conv_in, 3, 1)
    unshuffle_rows(blocks[0].downsamplers[0].conv, 3)
    identity_rows(blocks[1].resnets[0].conv_shortcut, 12, 0)
    small = min(BLOCKS[1], 48)
    reduce, _ = principal(patches_of(images, 2), small)
    middle = blocks[1].downsamplers[0].conv
    middle.weight[:small] = 0
    middle.weight[:small, :12, :2, :2] = reduce.reshape(small, 12, 2, 2)
    middle.bias[:small] = 0
    identity_rows(blocks[2].resnets[0].conv_shortcut, small, 0)
    # an 8x8 patch has 48 x 4 values, the last factor being the four 4x4 patches
    data = torch.einsum("kc,ncj->nkj", reduce, patches_of(images, 3).reshape(-1, 48, 4)).flatten(1)
    rows, variances = principal(data, count)
    basis = rows / variances.sqrt()[:, None]
    last = blocks[2].downsamplers[0].conv
    last.weight[:count] = 0
    last.weight[:count, :small, :2, :2] = basis.reshape(count, small, 2, 2)
    last.bias[:count] = -(basis @ data.mean(0))
    spread, head = blocks[3].resnets[0].conv_shortcut, encoder.conv_out
    spread.weight.zero_()
    spread.bias.zero_()
    head.weight.zero_()
    head.bias[:count] = 0
    head.bias[count:] = -6.0  # log variance: little noise
    size, share = BLOCKS[3] // GROUPS, count // GROUPS  # channels and latents of one group
    assert count % GROUPS == 0, "the latents are spread evenly over the groups"
    assert size >= 2 * share + 2, "each group holds its latents twice and the two constants"
    gain = math.sqrt((2 * QUIET**2 + 2 * share) / size)
    for index in range(count):
        group, place = divmod(index, share)
        plus, minus = size * group + place, size * group + share + place
        spread.weight[plus, index], spread.weight[minus, index] = 1, -1
        head.weight[index, plus, 1, 1], head.weight[index, minus, 1, 1] = gain, -gain
    for group in range(GROUPS):
        quiet = size * group + 2 * share
        spread.bias[quiet], spread.bias[quiet + 1] = QUIET, -QUIET


def random_batch(images: list[torch.Tensor], rng: random.Random) -> torch.Tensor:
    """Return random crops, flipped left to right half of the time."""
    size, count = rng.choice(CROP_PLANS)
    crops = []
    for _ in range(count):
        image = rng.choice(images)
        y = rng.randint(0, image.shape[1] - size)
        x = rng.randint(0, image.shape[2] - size)
        crop = cut(image, (y, x, size, size))
        crops.append(crop.flip(3) if rng.random() < 0.5 else crop)
    return torch.cat(crops).contiguous(memory_format=torch.channels_last)


def rounded(model: Any) -> Any:
    """Return a float32 copy whose weights went through float16, as a reader of the file gets it."""
    return copy.deepcopy(model).half().float().to(memory_format=torch.channels_last).eval()


@torch.no_grad()
def encode_all(model: Any, images: dict[str, torch.Tensor]) -> list[Example]:
    """Encode every photograph and clip frame with a (rounded) model: the posterior mode."""
    boxes = [(photo.name, photo.name, photo.box) for photo in PHOTOS]
    boxes += [("clip", CLIP.source, box) for box in clip_boxes(CLIP)]
    examples = []
    for key, source, box in boxes:
        target = cut(images[source], box)
        examples.append(Example(key, target, model.encode(target).latent_dist.mode()))
    return examples


def choose_scale(examples: list[Example]) -> float:
    """Return 1/std of all photograph latents (the clip is left out)."""
    values = torch.cat([example.latents.flatten() for example in examples if example.key != "clip"])
    return round(1.0 / float(values.std()), 5)


def quantise(examples: list[Example], scale: float) -> None:
    """Replace the latents by what a reader of the float16 files recovers."""
    for example in examples:
        example.latents = (example.latents * scale).half().float() / scale


@torch.no_grad()
def measure(model: Any, examples: list[Example]) -> dict[str, float]:
    """Decode everything and return the PSNR per key (the clip: mean over its frames)."""
    scores: dict[str, list[float]] = {}
    for example in examples:
        scores.setdefault(example.key, []).append(psnr(model.decode(example.latents).sample, example.target))
    return {key: sum(values) / len(values) for key, values in scores.items()}


def metadata_for(key: str) -> dict[str, str]:
    """Return the safetensors metadata of one latents file."""
    by_name = {photo.name: photo for photo in PHOTOS}
    if key != "clip":
        photo = by_name[key]
        box, extra = photo.box, {"title": photo.title, "source": photo.name, "licence": photo.licence}
    else:
        box = clip_boxes(CLIP)[0]
        extra = {
            "title": CLIP.title,
            "source": CLIP.source,
            "licence": by_name[CLIP.source].licence,
            "num_frames": str(CLIP.frames),
            "fps": str(CLIP.fps),
            "pan": ",".join(map(str, CLIP.pan)),
            "pan_formula": "t=i/(num_frames-1); y=floor(y0+(y1-y0)*t+0.5); x=floor(x0+(x1-x0)*t+0.5)",
        }
    crop = ",".join(map(str, box))
    return {"vae": "demo", "height": str(box[2]), "width": str(box[3]), "crop": crop, **extra}


def write_latents(folder: Path, examples: list[Example], scale: float) -> None:
    """Write one latents file per key; frames of the clip are stacked on axis 2."""
    folder.mkdir(parents=True)
    for key in dict.fromkeys(example.key for example in examples):
        parts = [(example.latents * scale).half() for example in examples if example.key == key]
        latents = torch.stack(parts, dim=2) if key == "clip" else parts[0]
        save_file({"latents": latents.contiguous()}, folder / f"{key}.safetensors", metadata_for(key))


def tidy_config(path: Path, scale: float) -> None:
    """Set the scaling factor and drop keys that only describe the machine it was trained on."""
    config: dict[str, Any] = json.loads(path.read_text())
    config.update(scaling_factor=scale, shift_factor=None)
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def export(average: Any, images: dict[str, torch.Tensor], out: Path, frozen: list[Example] | None) -> None:
    """Write config, weights and latents beside ``out``, then move the files into it."""
    model = rounded(average)
    examples = frozen or encode_all(model, images)
    scale = choose_scale(examples)
    if not frozen:
        quantise(examples, scale)
    scores = measure(model, examples)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo_vae_") as scratch:
        stage = Path(scratch)
        contiguous = model.half().to(memory_format=torch.contiguous_format)
        contiguous.save_pretrained(stage, safe_serialization=True)
        tidy_config(stage / "config.json", scale)
        write_latents(stage / "latents", examples, scale)
        for path in sorted(stage.rglob("*.*")):
            target = out / path.relative_to(stage)
            target.parent.mkdir(exist_ok=True)
            path.chmod(0o644)
            os.replace(path, target)
    text = ", ".join(f"{key} {value:.2f}" for key, value in scores.items())
    print(f"  checkpoint: scaling_factor {scale}, PSNR dB: {text}", flush=True)


class Trainer:
    """Holds the model, its EMA copy and the count of steps; runs the stages."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.rng = random.Random(args.seed)
        self.images = {photo.name: load_photo(photo.name) for photo in PHOTOS}
        self.model = build_model()
        self.resumed = args.resume is not None
        if self.resumed:
            self.model.load_state_dict(load_file(args.resume / "diffusion_pytorch_model.safetensors"))
        else:
            set_encoder(self.model, list(self.images.values()))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.out: Path = args.out
        self.total: int = args.steps
        self.every: int = args.checkpoint_steps
        self.start = self.told = time.monotonic()
        self.step = 0
        self.frozen: list[Example] | None = None

    def advance(self, optimiser: Muon, loss: torch.Tensor, rate: float) -> None:
        """Take one step at the given learning rate and update the average."""
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(rate)
        self.step += 1
        update_average(self.average, self.model, self.step)

    def report(self, stage: str, loss: float, quality: float) -> None:
        """Print now and then; write a checkpoint when it is due."""
        now = time.monotonic()
        if now - self.told > 20:
            self.told = now
            text = f"{stage} {now - self.start:6.0f} s, step {self.step}, loss {loss:.4f}, PSNR {quality:.2f}"
            print(text, flush=True)
        if self.step % self.every == 0 and self.step < self.total:
            export(self.average, self.images, self.out, self.frozen)

    def train_crops(self, stage: str, end: int, peak: float, floor: float) -> None:
        """Stages 1 and 2: random crops through encoder and decoder."""
        self.model.encoder.requires_grad_(stage == "joint")
        optimiser = Muon(self.model)
        images, first = list(self.images.values()), self.step
        while self.step < end:
            batch = random_batch(images, self.rng)
            posterior = self.model.encode(batch).latent_dist
            output = self.model.decode(posterior.sample()).sample
            loss = picture_loss(output, batch, 0.25)
            if stage == "joint":
                loss = loss + 1e-6 * posterior.kl().mean() / posterior.mean[0].numel()
            share = (self.step - first) / (end - first)
            self.advance(optimiser, loss, schedule(self.step - first, share, peak, floor))
            self.report(stage, float(loss.detach()), psnr(output.detach(), batch))

    def train_pictures(self, end: int, peak: float) -> None:
        """Stage 3: the decoder alone, from the frozen latents to whole pictures."""
        self.model.load_state_dict(self.average.state_dict())
        self.frozen = encode_all(rounded(self.average), self.images)
        quantise(self.frozen, choose_scale(self.frozen))
        self.model.encoder.requires_grad_(False)
        optimiser = Muon(self.model)
        photos = [example for example in self.frozen if example.key != "clip"]
        frames = [example for example in self.frozen if example.key == "clip"]
        first = self.step
        while self.step < end:
            example = self.rng.choice(frames if self.rng.random() < 0.35 else photos)
            output = self.model.decode(example.latents).sample
            loss = picture_loss(output, example.target, 0.1)
            share = (self.step - first) / (end - first)
            self.advance(optimiser, loss, schedule(self.step - first, share, peak, 0.02))
            quality = psnr(output.detach(), example.target)
            self.report(f"pictures {example.key}", float(loss.detach()), quality)

    def run(self) -> None:
        """Run the stages (after --resume: only the third) and write the final files."""
        if not self.resumed:
            ends = [round(share * self.total) for share in STAGES]
            self.train_crops("decoder", ends[0], 0.02, 0.5)
            self.train_crops("joint", ends[1], 0.008, 0.5)
        self.train_pictures(self.total, 0.008)
        export(self.average, self.images, self.out, self.frozen)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("worker/demo_vae"), help="folder to write")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint: run stage 3 from it")
    parser.add_argument("--checkpoint-steps", type=int, default=100, help="steps between checkpoints")
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
