"""The same 2 + 6 views by NVIDIA DALI on the CPU; run by `benchmarks.loader --dali-python`, or alone.

DALI decodes once as well. It has no random greyscale or solarisation in one graph without branches, so those are left
out, and it blurs only the first view, which all published recipes blur always: less work than ours.

python benchmarks/loader_dali.py FOLDER bicubic|triangle ROUNDS      prints one line, CPU seconds an image, a round
"""

import sys
import time
from pathlib import Path

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import pipeline_def

BATCH_SIZE = 50
KINDS = {"bicubic": types.INTERP_CUBIC, "triangle": types.INTERP_TRIANGULAR}


@pipeline_def
def graph(files, kind):
    data, _ = fn.readers.file(files=files)
    image = fn.decoders.image(data, device="cpu")
    outputs = []
    for i in range(8):
        size, area = (224, (0.3, 1.0)) if i < 2 else (128, (0.05, 0.3))
        view = fn.random_resized_crop(
            image,
            size=size,
            random_area=area,
            random_aspect_ratio=(3 / 4, 4 / 3),
            interp_type=KINDS[kind],
            antialias=True,
        )
        apply = fn.cast(fn.random.coin_flip(probability=0.8), dtype=types.FLOAT)
        view = fn.color_twist(
            view,
            brightness=1 + apply * fn.random.uniform(range=(-0.4, 0.4)),
            contrast=1 + apply * fn.random.uniform(range=(-0.4, 0.4)),
            saturation=1 + apply * fn.random.uniform(range=(-0.2, 0.2)),
            hue=apply * fn.random.uniform(range=(-36, 36)),
        )
        if i == 0:
            view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
        outputs.append(
            fn.crop_mirror_normalize(
                view,
                mirror=fn.random.coin_flip(),
                dtype=types.FLOAT,
                mean=[123.675, 116.28, 103.53],
                std=[58.395, 57.12, 57.375],
            )
        )
    return tuple(outputs)


def main() -> None:
    folder, kind, rounds = sys.argv[1:]
    files = [str(path) for path in sorted(Path(folder).iterdir())]
    pipe = graph(files, kind, batch_size=BATCH_SIZE, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipe.build()
    pipe.run()
    for _ in range(int(rounds)):
        begin, count = time.process_time(), 0
        while count < len(files):
            pipe.run()
            count += BATCH_SIZE
        print((time.process_time() - begin) / count, flush=True)


main()
