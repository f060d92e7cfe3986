"""Federations with one exchange: every site trains once and submits one file, and a hub combines the experts.

base.py        the public model that all sites start from, frozen
adapters.py    low-rank adapters of several sites on one module      guests.py    whole experts next to the public ones
package.py     the file that a site submits, signed                  train.py     how a site makes it; dp.py: with noise
hub.py         the folder of packages: add, withdraw, list
routers.py     which site's part computes a token                    build.py     a hub as one model; built.py: loads it
evaluate.py    scores of packages and routers by domain              trust.py     poisoned packages, memorised text
report.py      a hub as one page of HTML                             commands.py  the command line
"""
