"""HiT-DVAE: hierarchical Transformer dynamical VAE (Bie et al. 2022; Lin et al., ICASSP 2023).

LigHT-DVAE with two decoders, the second for the prior of z. The main stream of the prior is x,
which makes the queries and the residual path, and its source is [z, w] (Lin et al., section 2.3).
"""

from .light_dvae import LigHTDVAE


class HiTDVAE(LigHTDVAE):
    num_decoders = 2
    prior_main_stream = "spectrum"
