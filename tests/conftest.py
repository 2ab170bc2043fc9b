"""Settings every test shares: nothing is fetched from the model hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
