"""Studies: questions with controls, seeds and intervals, from a grid of runs to a sentence.

`plan` says what is run, `trial` carries one run out, `runner` all of them, `results` keeps what they found, `findings`
turns it into differences, tables and verdicts. The questions themselves are in `medmap.studies`, a file each.
"""
