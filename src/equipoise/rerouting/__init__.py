"""LASER: routing by the shape of the gate's scores and the load, at inference (arXiv 2510.03293)."""

from equipoise.rerouting.calibration import Calibration, calibrate
from equipoise.rerouting.install import Laser, installed, laser
from equipoise.rerouting.selection import Rule
from equipoise.rerouting.thresholds import Thresholds, load_laser, save_laser

__all__ = ["Calibration", "Laser", "Rule", "Thresholds", "calibrate", "installed", "laser", "load_laser", "save_laser"]
