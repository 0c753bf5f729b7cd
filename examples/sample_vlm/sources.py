"""The real-world raw material of the scenes and its train/test split: photographs, handwritten digits, fonts and words.

Nothing is downloaded: photographs and digits come with scikit-image, scikit-learn and matplotlib. A photograph, a digit
sample and a word each belong to exactly one split, so nothing seen in training returns in a benchmark.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import sklearn
from PIL import Image, ImageFont
from sklearn.datasets import load_digits

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Photo:
    """One bundled photograph: where it lies, its split, and the terms under which it may be used."""

    name: str
    package: str
    split: str
    terms: str


PHOTOS = (
    Photo("astronaut.png", "skimage", "train", "NASA, public domain"),
    Photo("brick.png", "skimage", "train", "CC0Textures, CC0"),
    Photo("camera.png", "skimage", "train", "Lav Varshney, CC0"),
    Photo("coffee.png", "skimage", "train", "Rachel Michetti, CC0"),
    Photo("coins.png", "skimage", "train", "Brooklyn Museum, no known copyright restrictions"),
    Photo("grass.png", "skimage", "train", "CC0Textures, CC0"),
    Photo("hubble_deep_field.jpg", "skimage", "train", "NASA, public domain"),
    Photo("moon.png", "skimage", "train", "NASA / USGS, public domain"),
    Photo("motorcycle_left.png", "skimage", "train", "D. Scharstein, CC0"),
    Photo("flower.jpg", "sklearn", "train", "vultilion (Flickr), CC BY 2.0"),
    Photo("chelsea.png", "skimage", "test", "Stefan van der Walt, CC0"),
    Photo("clock_motion.png", "skimage", "test", "Stefan van der Walt, public domain"),
    Photo("gravel.png", "skimage", "test", "CC0Textures, CC0"),
    Photo("grace_hopper.jpg", "matplotlib", "test", "US Navy, public domain"),
    Photo("rocket.jpg", "skimage", "test", "SpaceX, public domain"),
    Photo("china.jpg", "sklearn", "test", "danielbuechele (Flickr), CC BY 2.0"),
)

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_WORDS = """
ACE ACT AGE AIR ALE ANT APE ARC ARK ARM ART ASH ATE AXE BAD BAG BAN BAR BAT BAY BED BEE BEG BET BIG BIN BIT BOW BOX BOY
BUD BUG BUN BUS BUY CAB CAN CAP CAR CAT COD COW CRY CUB CUP CUT DAY DEN DEW DIG DIM DIP DOG DOT DRY DUE EAR EAT EGG ELF
ELK END ERA EVE EYE FAN FAR FAT FED FEE FEW FIG FIN FIT FIX FLY FOG FOX FUN FUR GAP GAS GEM GET GIG GUM GUN GUY GYM HAM
HAT HAY HEN HER HIP HIT HOT HUB HUG HUT ICE INK INN ION IVY JAM JAR JAW JET JOB JOG JOY JUG KEY KID KIT LAB LAP LAW LEG
LID LIP LOG LOT LOW MAP MAT MIX MOB MUD MUG NET NEW NUT OAK OAR OIL OLD OWL PAN PAW PEA PEN PET PIE PIG PIN POT RAT RAY
RED RIB ROD ROW RUG SAW SEA SKI SKY SUN TAP TEA TIN TOE TOY VAN WAX WEB WIG ZOO
ACID AREA ARMY ATOM BABY BACK BAKE BALL BAND BANK BARN BATH BEAN BEAR BELL BELT BIKE BIRD BLUE BOAT BODY BOLD BONE BOOK
BOOT BOWL BULB BUSH CAFE CAGE CAKE CALM CAMP CARD CART CASH CAVE CITY CLAY CLUB COAL COAT COIN COLD COOK CORN CRAB CREW
DARK DEEP DEER DESK DISH DOCK DOOR DRUM DUCK DUST EAST ECHO EXIT FACE FARM FAST FERN FILM FIRE FISH FLAG FOOD FORK FROG
FUEL GAME GATE GIFT GOLD GULF HAND HARP HAWK HERO HILL HOME HOOK HORN HUGE IRON JAZZ JOKE JUMP KING KITE KIWI LAKE LAMB
LAMP LEAF LIME LION LOCK LONG MAIL MASK MAZE MILK MINT MOON NEST NOON NORD OPEN OVAL OVEN PARK PEAR PIPE PLUM POET POND
QUIZ RAIN RICE RING ROAD ROCK ROSE SALT SAND SHIP SHOP SILK SNOW SOAP SOUP STAR STOP SWAN TAXI TENT TREE TUBE TUNA TYPE
VASE VIEW WALL WAVE WEST WIND WOLF WOOD YARD YEAR ZERO ZONE
APPLE BEACH BERRY BIRCH BLACK BLOCK BOARD BRAIN BREAD BRICK BRUSH CABIN CABLE CANDY CHAIR CHALK CHEST CLOCK CLOUD COACH
CORAL CROWN DAILY DANCE DREAM EAGLE EARTH FIELD FLAME FLOUR FRUIT GHOST GLASS GRAPE GREEN HEART HONEY HORSE HOTEL HOUSE
JEWEL JUICE KNIFE LEMON LIGHT LUNCH MANGO MAPLE MEDAL METAL MONEY MOUSE MUSIC NIGHT NORTH NURSE OCEAN OLIVE ONION PAINT
PANDA PAPER PEACH PEARL PIANO PILOT PIZZA PLANT QUEEN RADIO RIVER ROBOT SALAD SHARK SHEEP SMILE SOUTH SPOON STEAM STONE
STORM SUGAR TABLE TIGER TOAST TOWEL TRAIN TRUCK TULIP VIDEO WATCH WATER WHALE WHEAT WHITE ZEBRA
""".split()


@cache
def words(split: str) -> tuple[str, ...]:
    """The upper-case words of a split; every fifth word (in alphabetical order) is held out for `test`."""
    ordered = sorted(set(_WORDS))
    held_out = ordered[::5]
    return tuple(held_out) if split == "test" else tuple(w for w in ordered if w not in set(held_out))


@cache
def photos(split: str) -> tuple[Image.Image, ...]:
    """The RGB photographs of a split at their bundled size."""
    return tuple(Image.open(_photo_path(p)).convert("RGB") for p in PHOTOS if p.split == split)


@cache
def digits(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """Handwritten digits of a split: for each class 0-9 its (8, 8) uint8 ink images; every fifth sample is `test`."""
    bundle = load_digits()
    ink = np.clip(bundle.images * 16, 0, 255).astype(np.uint8)
    wanted = [i for i in range(len(ink)) if (i % 5 == 0) == (split == "test")]
    return tuple(tuple(ink[i] for i in wanted if bundle.target[i] == d) for d in range(10))


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font shipped with matplotlib at `size` pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _photo_path(photo: Photo) -> Path:
    """Where the package keeps the photograph."""
    folder = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
        "matplotlib": Path(matplotlib.get_data_path()) / "sample_data",
    }[photo.package]
    return folder / photo.name
