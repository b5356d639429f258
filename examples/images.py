"""Image classification from folders, over clients that see different things.

    python examples/images.py
    python examples/images.py photos=folder model=google/vit-base-patch16-224-in21k

The folder holds `train/<class>/*.png` and `test/<class>/*.png` (or JPEG). Without one, the 1,797
scanned digits that come with scikit-learn are written into `photos`. The default model is one of
the hub with 5.7 million weights.
"""

# %%
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import fedsieve

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
photos = Path(given.get("photos", "photos"))
model = given.get("model", "WinKawaks/vit-tiny-patch16-224")  # or a folder
rounds = int(given.get("rounds", "10"))
steps = int(given.get("steps", "10"))
most = int(given.get("digits", "1797"))  # that are written

# %% [markdown]
# The images: every fifth is for the test.

# %%
if not photos.is_dir():
    digits = load_digits()
    for number, digit in enumerate(digits.target[:most]):
        place = photos / ("train" if number % 5 else "test") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((digits.images[number] * 15).astype(np.uint8))
        grey.resize((64, 64)).save(place / f"{number}.png")

# %% [markdown]
# Five clients, each with its own mixture of classes (Dirichlet with concentration 0.5): the lower
# that is, the less they have in common. FLASC sends a quarter of the entries each way.

# %%
run = fedsieve.finetune(
    model,
    photos / "train",
    fedsieve.flasc(server=fedsieve.adam(5e-3), ranked="change"),
    partition={"kind": "dirichlet", "clients": 5, "alpha": 0.5},
    task="image-classification",
    image="image",
    rounds=rounds,
    budgets=1 / 4,
    training=fedsieve.Training(optimizer="adamw", lr=3e-3, steps=steps, augment="crop-flip"),
    test=photos / "test",
)
for each in run:
    print(each.round, f"accuracy {each.accuracy:.3f}", f"{each.total_bytes / 1e6:.2f} MB so far")

# %% [markdown]
# Which classes it tells, and which it does not.

# %%
for told in run.score(photos / "test").details.classes:
    print(told)
print(run.report("report"))  # one page that opens offline
