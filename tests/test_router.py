"""The resilient shape on Ray Serve: two models behind one URL, replicas that die, and replicas that come and go by load."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.serve
import yaml
from ray.util.state import list_actors
from test_serve import CHAT, CHAT_URL, COMPLETION_URL, Server, chat, server_of, steps_of  # noqa: F401

from medusa_ray import config, serve
from medusa_ray.config import ServeConfig, UserError
