"""Time and memory of a Gauss-Newton step against the number of images: kernel form beside parameter form.

    python -m benchmarks.unlearning_scale --dataset_name <folder with CIFAR-10> --output_dir outputs/unlearning_scale

ResNet-20 with its batch-norm scales and shifts and its head, p = 2,026 parameters, of which a class is to be forgotten.
A step with one random probe an image reads all images three times, and once for derivatives of single images. Every
size runs in a process of its own; memory is what it takes, with one copy of the images (12 KB each); a form ends with
the first size that does not fit `--memory`. Random weights and, without `--dataset_name`, random images do as well:
neither changes what is computed. Prints a table, and writes it as JSON with a plot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser

from peft_ext.unlearning import GaussNewton
from recipes.support.usage import Usage
from recipes.tasks.resnet import CifarResNet

CLASSES = 10


@dataclass
class Arguments:
    """What is measured."""

    output_dir: str = field(metadata={"help": "Where to write results.json and scale.png."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id of images with a split train. Default: random images."}
    )
    sizes: list[int] = field(
        default_factory=lambda: [500, 1000, 2000, 5000, 10000, 20000, 50000], metadata={"help": "Numbers of images."}
    )
    memory: float = field(default=8e9, metadata={"help": "Bytes that matrices may take."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})


def images(dataset_name: str | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many images, `(size, 3, 32, 32)`, and their classes."""
    if dataset_name is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % CLASSES
    import datasets
    import numpy as np

    rows = datasets.load_dataset(dataset_name, split="train").shuffle(seed=0).select(range(size))
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in rows["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(rows["label"])


def measure(arguments: Arguments, form: str, size: int) -> None:
    """Prints one result as JSON; an error that says that the form does not fit is one too."""
    torch.set_num_threads(arguments.threads)
    x, y = images(arguments.dataset_name, size)
    torch.manual_seed(0)
    model = CifarResNet(num_labels=CLASSES).eval()

    def loader(chosen: torch.Tensor) -> DataLoader:
        def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
            pixels, labels = zip(*rows)
            return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}

        return DataLoader(TensorDataset(x[chosen], y[chosen]), batch_size=16, collate_fn=collate)

    method = GaussNewton(form=form, memory=arguments.memory, draws=1, max_steps=1, retain_tolerance=1e9)
    try:
        with Usage(torch.device("cpu")) as usage:
            method.fit(model, loader(y != 0), loader(y == 0), parameters="bn|linear")
    except ValueError as error:
        print(json.dumps({"form": form, "images": size, "error": str(error)}))
        return
    print(json.dumps({"form": form, "images": size, "seconds": usage.seconds, "bytes": usage.peak_memory}))


def plot(results: list[dict], path: Path) -> None:
    """Time and memory against the number of images, a line a form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axis, key, unit in zip(axes, ("bytes", "seconds"), (1e9, 60)):
        for form, colour in (("kernel", "#D55E00"), ("parameter", "#0072B2")):
            rows = [row for row in results if row["form"] == form and "seconds" in row]
            label = f"{form} form"
            axis.plot([r["images"] for r in rows], [r[key] / unit for r in rows], "o-", color=colour, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("images")
        axis.grid(color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("peak memory, GB")
    axes[1].set_ylabel("minutes")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs all."""
    if len(sys.argv) == 4 and sys.argv[1] == "one":
        measure(Arguments(**json.loads(sys.stdin.read())), sys.argv[2], int(sys.argv[3]))
        return
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    results = []
    for form in ("kernel", "parameter"):
        for size in arguments.sizes:
            command = [sys.executable, "-m", "benchmarks.unlearning_scale", "one", form, str(size)]
            run = subprocess.run(
                command, input=json.dumps(asdict(arguments)), stdout=subprocess.PIPE, text=True, check=True
            )
            results.append(json.loads(run.stdout.splitlines()[-1]))
            print(results[-1], file=sys.stderr, flush=True)
            if "error" in results[-1]:
                break
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, folder / "scale.png")
    table = Table("form", "images", "seconds", "peak memory, GB")
    for row in results:
        cells = [f"{row['seconds']:.1f}", f"{row['bytes'] / 1e9:.2f}"] if "seconds" in row else [row["error"], ""]
        table.add_row(row["form"], f"{row['images']:,}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
