"""TFDS builder for Clothing1M (Xiao et al., 2015), from the archive as its authors hand it out."""

import pathlib

import tensorflow_datasets as tfds

CLASS_NAMES = (
    "T-Shirt",
    "Shirt",
    "Knitwear",
    "Chiffon",
    "Sweater",
    "Hoodie",
    "Windbreaker",
    "Jacket",
    "Down Coat",
    "Suit",
    "Shawl",
    "Dress",
    "Vest",
    "Underwear",
)

# split: (file with the keys, file with their labels)
SPLITS = {
    "noisy_train": ("noisy_train_key_list.txt", "noisy_label_kv.txt"),
    "clean_train": ("clean_train_key_list.txt", "clean_label_kv.txt"),
    "clean_val": ("clean_val_key_list.txt", "clean_label_kv.txt"),
    "clean_test": ("clean_test_key_list.txt", "clean_label_kv.txt"),
}


class Clothing1m(tfds.core.GeneratorBasedBuilder):
    """A million shop photographs with labels from the text around them, 14 classes.

    The archive folder holds four lists of keys (a key is the path of an image in that folder),
    two files of lines ``KEY LABEL``, and the images::

        noisy_train_key_list.txt  clean_train_key_list.txt  clean_val_key_list.txt
        clean_test_key_list.txt   noisy_label_kv.txt        clean_label_kv.txt
        images/0/00/....jpg ...

    The splits are named after the key lists. Labels are the noisy ones for ``noisy_train`` and
    the clean ones for the others. JPEG files are stored as they are.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The unpacked Clothing1M archive: key lists, labels and images/."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clothing1M: fashion photographs with noisy labels and a clean subset.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                    "key": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/Cysu/noisy_label",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        root = pathlib.Path(dl_manager.manual_dir)
        return {
            split: self._generate_examples(root, root / keys, root / labels)
            for split, (keys, labels) in SPLITS.items()
        }

    def _generate_examples(
        self, root: pathlib.Path, keys_path: pathlib.Path, labels_path: pathlib.Path
    ):
        labels = {}
        for number, line in enumerate(labels_path.read_text().splitlines(), 1):
            key, _, label = line.rpartition(" ")
            if not key or not label.isdigit() or int(label) >= len(CLASS_NAMES):
                raise ValueError(f"{labels_path}:{number}: expected 'KEY LABEL', got {line!r}")
            labels[key] = int(label)
        for number, key in enumerate(keys_path.read_text().split(), 1):
            if key not in labels:
                raise ValueError(f"{keys_path}:{number}: {key} has no label in {labels_path.name}")
            with open(root / key, "rb") as image:
                yield key, {"image": image, "label": labels[key], "key": key}
