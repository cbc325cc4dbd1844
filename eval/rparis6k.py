"""Revisited Paris (Philbin et al., CVPR 2008; Radenovic et al., CVPR 2018): 6,322 images, 70 queries.

All images of both archives lie in `jpg/`, without the folders that they unpack to, beside `gnd_rparis6k.pkl`. A query
is a box in an image that is not in the database. Metric: mAP, Medium and Hard.
"""

from dinoreg.evaluation.readers.revisited import revisited

ARCHIVES = "paris_1.tgz and paris_2.tgz, their pictures in one folder"
MEDIUM, HARD = (84.6, 90.3, 92.7, 92.1), (68.5, 78.6, 83.5, 82.6)
BENCHMARK = revisited("rparis6k", "Revisited Paris", 6_322, ARCHIVES, MEDIUM, HARD)

if __name__ == "__main__":
    BENCHMARK.script()
