"""The named configurations, one file each."""

from train.config import Config
from train.configs import digits

CONFIGS: dict[str, Config] = {"digits": digits.CONFIG}
