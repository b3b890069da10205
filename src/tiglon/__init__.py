"""From a click log to recommendations.

from tiglon.recipes import train
from tiglon.serving.bundle import Bundle
"""

__version__ = "0.1.0"
