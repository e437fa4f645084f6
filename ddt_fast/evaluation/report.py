"""What the commands that score show: progress and the table."""

from typing import Any

import numpy as np
from tqdm import tqdm

from ddt_fast.data.image_file import Images
from ddt_fast.wording import plural

PICTURE_IMAGES = 100
_ROWS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}


class Progress:
    """Shows the progress of reading, and keeps evenly spread images for the picture."""

    def __init__(self) -> None:
        self.shown: dict[int, Images] = {}
        self._bar: tqdm[Any] | None = None
        self._seen = 0

    def __call__(self, role: str, batch: Images, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc=role, unit="img", dynamic_ncols=True)
        if role == "samples":
            for place in np.linspace(0, total - 1, min(total, PICTURE_IMAGES)).round().astype(int).tolist():
                if self._seen <= place < self._seen + len(batch):
                    self.shown[place] = batch[place - self._seen].copy()
        self._seen += len(batch)
        self._bar.update(len(batch))
        if self._seen == total:
            self._bar.close()
            self._bar, self._seen = None, 0


def report_table(report: dict[str, Any]) -> str:
    """A report of `evaluate` as lines to print."""
    values, lines = report["metrics"], []
    for role in ("samples", "reference"):
        if (found := report.get(role)) is not None:
            count = found["num_images"]
            size = f" of {found['width']}x{found['height']}" if found["width"] else ""
            images = f"{plural(count, 'image')}{size}" if count else "statistics"
            lines.append(f"{role:<18}{found['source']}: {images}")
    for name, title in _ROWS.items():
        if name in values:
            spread = f" ± {values[name + '_std']:.4g}" if name + "_std" in values else ""
            decimals = 6 if name == "kid" else 4
            lines.append(f"{title:<18}{values[name]:.{decimals}f}{spread}")
        elif name in report["not_computed"]:
            lines.append(f"{title:<18}not computed: {report['not_computed'][name]}")
    if (features := report["features"]) is not None:
        published = ", published weights" if features.get("published_weights") else ""
        lines.append(f"{'features':<18}{features['name']}{published}, on {features['device']}")
    rate = report["images_per_second"]
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["seconds"].items())
    lines.append(f"{'time':<18}{spent}" + (f"; {rate:.1f} img/s" if rate else ""))
    return "\n".join(lines)
