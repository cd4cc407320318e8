"""Whether train and val images can be classified, and into how many classes."""

from data_prep.schema import open_beton, read_labels
from trainer.recipe import Data, RecipeError


def count_classes(data: Data) -> int:
    """The number of classes of the train and val images.

    raises: RecipeError if there are no val images, images without a label, or classes of other names in the two
    """
    if data.val is None:
        raise RecipeError("evaluation needs labelled val images; give data.val=VAL.beton")
    train, val = open_beton(data.train), open_beton(data.val)
    for beton in (train, val):
        if not beton.labelled:
            raise RecipeError(
                f"evaluation needs labels, and {beton.path} has images without; convert class folders for it"
            )
    if train.classes and val.classes and train.classes != val.classes:
        raise RecipeError(
            f"{train.path} and {val.path} have different classes ({len(train.classes)} and {len(val.classes)}, first "
            f"{train.classes[0]} and {val.classes[0]}), so a label means two things; convert both from one data set"
        )
    return max(int(read_labels(beton.path).max()) for beton in (train, val)) + 1
