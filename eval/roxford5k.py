"""Revisited Oxford Buildings (Philbin et al., CVPR 2007; Radenovic et al., CVPR 2018): 4,993 images, 70 queries.

All images of the archive lie in `jpg/`, beside `gnd_roxford5k.pkl`. A query is a box in an image that is not in
the database. Metric: mAP, Medium and Hard.
"""

from dinoreg.evaluation.published import CARD, released
from dinoreg.evaluation.readers.revisited import SIZE, revisited

MEDIUM, HARD = (68.8, 72.9, 75.1, 73.6), (43.2, 49.5, 54.0, 52.3)
REGISTERS = released((39.5, 51.0, 55.7, 58.2), CARD, SIZE, registers=4, variant="Hard")
BENCHMARK = revisited("roxford5k", "Revisited Oxford", 4_993, "oxbuild_images.tgz", MEDIUM, HARD, REGISTERS)

if __name__ == "__main__":
    BENCHMARK.script()
