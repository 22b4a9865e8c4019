"""What tissues are made of, at 1.5 T and 3 T: water, relaxation, diffusion; and what a contrast agent does to them.

Each number stands with its source. ✓ marks a value that was read in the named paper's abstract or text, or in a table
that quotes it; † one that we know from the named paper but did not read there again. Everything else is a round value
of ours and says so ("ours"): a choice that makes plausible images, not a measurement. Spreads that a paper reports are
between subjects unless said otherwise; where a paper gives none, ours is about a tenth of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medmap.errors import InputError


@dataclass(frozen=True)
class Spread:
    """A property that differs between subjects: mean and standard deviation ``sd``, in the property's unit."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Tissue:
    """What a tissue contributes to a signal.

    pd:        proton density relative to water
    t1_s:      longitudinal relaxation time T1, s
    t2_s:      transverse relaxation time T2, s, as a train of refocused echoes sees it
    t2star_s:  T2*, s: decay without refocusing, never slower than T2
    adc_mm2_s: apparent diffusion coefficient, mm²/s, averaged over directions
    """

    pd: Spread
    t1_s: Spread
    t2_s: Spread
    t2star_s: Spread
    adc_mm2_s: Spread


@dataclass(frozen=True)
class Relaxivity:
    """What 1 mmol/l of contrast agent adds to the relaxation rates 1/T1 (``r1``) and 1/T2 (``r2``), l/(mmol·s)."""

    r1: Spread
    r2: Spread


def tissue(name: str, field_t: float) -> Tissue:
    """Properties of a tissue of `TISSUES` at a field of 1.5 or 3 tesla.

    Raises InputError, by name, for a tissue or a field that the table does not have.

    >>> tissue("white", 3.0).t1_s
    Spread(mean=0.838, sd=0.05)
    """
    if name not in TISSUES:
        raise InputError(f"tissue {name!r}: not in the table; expected one of {', '.join(TISSUES)}")
    return TISSUES[name][_known(field_t)]


def relaxivity(field_t: float) -> Relaxivity:
    """Relaxivity of extracellular gadolinium chelates in plasma at 1.5 or 3 tesla; the spread is between agents.

    Raises InputError for another field.

    >>> relaxivity(1.5).r1.mean
    4.3
    """
    return GADOLINIUM[_known(field_t)]


def _known(field_t: float) -> float:
    if field_t not in GADOLINIUM:
        fields = " or ".join(f"{field:g}" for field in GADOLINIUM)
        raise InputError(f"field: found {field_t} T; expected {fields} T, for which relaxation times are known")
    return field_t


_Pair = tuple[float, float]
_Times = tuple[_Pair, _Pair, _Pair]


def _at_fields(pd: _Pair, adc: _Pair, t15: _Times, t30: _Times) -> dict[float, Tissue]:
    """A tissue whose water and diffusion do not depend on the field; ``t15``, ``t30``: T1, T2, T2* there."""
    return {field: _at_field(pd, adc, times) for field, times in ((1.5, t15), (3.0, t30))}


def _at_field(pd: _Pair, adc: _Pair, times: _Times) -> Tissue:
    t1_s, t2_s, t2star_s = (Spread(*time) for time in times)
    return Tissue(Spread(*pd), t1_s, t2_s, t2star_s, Spread(*adc))


GADOLINIUM: Mapping[float, Relaxivity] = {
    # Rohrer et al., Invest Radiol 2005 †, bovine plasma at 37 °C, mean and spread of gadopentetate, gadobutrol,
    # gadoteridol, gadoterate and gadodiamide: r1 4.1 5.2 4.1 3.6 4.3 and r2 4.6 6.1 5.0 4.3 5.2 at 1.5 T,
    # r1 3.7 5.0 3.7 3.5 4.0 and r2 5.2 7.1 5.7 4.9 5.6 at 3 T. Szomolanyi et al., Invest Radiol 2019 ✓ agree on r1 in
    # human plasma, gadobutrol gadoteridol gadoterate: 4.78 3.80 3.32 at 1.5 T, 4.97 3.28 3.00 at 3 T.
    1.5: Relaxivity(r1=Spread(4.3, 0.6), r2=Spread(5.0, 0.7)),
    3.0: Relaxivity(r1=Spread(4.0, 0.6), r2=Spread(5.7, 0.8)),
}
"""{field in tesla: relaxivity}."""

TISSUES: Mapping[str, Mapping[float, Tissue]] = {
    # --- Brain ---------------------------------------------------------------------------------------------------
    # Water of white and cortical grey matter: Oros-Peusquens et al., Front Neurol 2019 ✓ (69.1 ± 1.7 %, 83.7 ± 1.2 %).
    # T1: Wright et al., MAGMA 2008 ✓ (MPRAGE; deep_grey: mean of putamen and caudate head).
    # T2: Stanisz et al., Magn Reson Med 2005, ✓ at 3 T, † at 1.5 T: excised tissue at 37 °C, trains of refocused
    # echoes, which the fast spin echo of clinics is as well. Single echoes hardly tell cortex (76 ms) from white matter
    # (71 ms) at 3 T: Cox and Gowland, Magn Reson Med 2010 ✓.
    # T2*: Peters et al., Magn Reson Imaging 2007: white and cortex ✓, caudate and putamen †; spreads ours.
    # ADC: Helenius et al., AJNR 2002 ✓, 80 healthy adults at 1.5 T.
    "white": _at_fields(
        pd=(0.691, 0.017),
        adc=(0.70e-3, 0.03e-3),
        t15=((0.646, 0.032), (0.072, 0.004), (0.0662, 0.005)),
        t30=((0.838, 0.050), (0.069, 0.003), (0.0532, 0.004)),
    ),
    "grey": _at_fields(
        pd=(0.837, 0.012),
        adc=(0.89e-3, 0.04e-3),
        t15=((1.197, 0.134), (0.095, 0.008), (0.0840, 0.006)),
        t30=((1.607, 0.112), (0.099, 0.007), (0.0660, 0.005)),
    ),
    # Water and T2 ours: between white matter and cortex; iron shortens T2.
    "deep_grey": _at_fields(
        pd=(0.81, 0.015),
        adc=(0.75e-3, 0.03e-3),
        t15=((1.097, 0.065), (0.085, 0.006), (0.057, 0.005)),
        t30=((1.364, 0.060), (0.078, 0.006), (0.036, 0.005)),
    ),
    # T1 and T2 at 3 T: "Quantification of T1 and T2 of subarachnoid CSF", Magn Reson Med 2023 ✓, midway between
    # subarachnoid space (4.31 ± 0.15, 1.89 ± 0.07 s) and frontal horns (4.45 ± 0.19, 2.37 ± 0.07 s); the spread of T2
    # spans both. T1 does not depend on the field: Rooney et al., Magn Reson Med 2007 †. T2 at 1.5 T and T2* ours.
    # ADC: free water at 37 °C, Mills, J Phys Chem 1973 ✓; spread ours.
    "csf": _at_fields(
        pd=(1.0, 0.01),
        adc=(3.05e-3, 0.10e-3),
        t15=((4.38, 0.17), (2.20, 0.25), (0.50, 0.15)),
        t30=((4.38, 0.17), (2.13, 0.25), (0.30, 0.10)),
    ),
    # Venous, as the vessels that an image shows best. T1: Sharma et al., J Magn Reson Imaging 2006 ✓ at 1.5 T (heart);
    # Qin et al., Magn Reson Med 2011 ✓ at 3 T (jugular vein). T2: Atlas, Magnetic Resonance Imaging of the Brain and
    # Spine ✓ (150 and 80 ms; Qin et al. ✓ find 62 ± 6 ms in the jugular vein at 3 T); spread ours. T2* at 1.5 T: Li et
    # al., Magn Reson Med 1998 ✓; at 3 T ours. Water ours. ADC ours: moving blood has none; as fast as free water it
    # vanishes under diffusion weighting.
    "blood": _at_fields(
        pd=(0.87, 0.02),
        adc=(3.0e-3, 0.30e-3),
        t15=((1.58, 0.13), (0.150, 0.025), (0.108, 0.006)),
        t30=((1.852, 0.104), (0.080, 0.015), (0.030, 0.006)),
    ),
    # --- Brain tumour --------------------------------------------------------------------------------------------
    # Tumours differ more among each other than any mean can say, and few were measured. Water, T2, T2* and everything
    # at 1.5 T are ours: T1 there is 0.85 to 1 times that at 3 T, between grey matter's 0.75 and fluid's 1.
    # T1 and T2 ours, such that oedema differs from healthy tissue and from the core as it does in the sixteen patients
    # of docs/phantom.md: T1 at 3 T is above the 1.26 ± 0.36 s of peritumoural white matter in de Blank et al. 2019 ✓
    # (fingerprinting of children and young adults). ADC ours, between solid tumour and necrosis.
    "oedema": _at_fields(
        pd=(0.87, 0.02),
        adc=(1.45e-3, 0.20e-3),
        t15=((1.43, 0.21), (0.198, 0.040), (0.130, 0.030)),
        t30=((1.68, 0.25), (0.188, 0.040), (0.100, 0.025)),
    ),
    # T1 at 3 T: midway between low-grade (1.355 ± 0.187 s) and high-grade tumours (1.863 ± 0.070 s) of de Blank et al.
    # 2019 ✓; T2 there is 1.5 and 2.4 times white matter's, ours 1.7 times. Contrast agent took 0.84 ± 0.21 s off the
    # T1 of enhancing glioblastoma ("Quantitative T1 mapping indicates tumor infiltration beyond the enhancing part of
    # glioblastomas", NMR Biomed 2020 ✓): 0.17 mmol/l does so. ADC: 17 high-grade gliomas, Oncol Lett 2017;14:2009 ✓.
    "solid": _at_fields(
        pd=(0.87, 0.02),
        adc=(1.09e-3, 0.28e-3),
        t15=((1.34, 0.21), (0.122, 0.028), (0.095, 0.025)),
        t30=((1.58, 0.25), (0.115, 0.028), (0.075, 0.020)),
    ),
    # All ours. ADC: between two examples, 1.85 and 2.44, in PLOS ONE 2016;11:e0162565 ✓.
    "necrosis": _at_fields(
        pd=(0.94, 0.02),
        adc=(2.10e-3, 0.35e-3),
        t15=((2.05, 0.33), (0.275, 0.080), (0.180, 0.060)),
        t30=((2.20, 0.35), (0.260, 0.080), (0.140, 0.045)),
    ),
    # Subacute, methaemoglobin. T1 ours, after plasma round an old clot: from 1.3 to 0.4 s in six days at 0.2 T (Nummi
    # et al., Acta Radiol 1986 ✓). T2 ours, with a wide spread: short while the cells are whole, long once they are
    # lysed (AJR 1988;150:171 ✓). ADC: 0.72 of normal tissue's in late subacute haemorrhage, Kang et al., Korean J
    # Radiol 2001 ✓; spread ours.
    "haemorrhage": _at_fields(
        pd=(0.85, 0.03),
        adc=(0.54e-3, 0.12e-3),
        t15=((0.50, 0.12), (0.070, 0.025), (0.025, 0.008)),
        t30=((0.58, 0.14), (0.060, 0.022), (0.015, 0.005)),
    ),
    # Fluid of a resection cavity. All numbers ours, between necrosis and CSF: postoperative cysts look like CSF in spin
    # echo ("Cystic intracranial lesions: magnetic resonance imaging", Radiology 1985 ✓), and some turn bright in FLAIR
    # (Bette et al., RöFo 2017 ✓), as protein makes them.
    "cavity": _at_fields(
        pd=(0.98, 0.01),
        adc=(2.75e-3, 0.20e-3),
        t15=((3.40, 0.50), (1.30, 0.40), (0.30, 0.10)),
        t30=((3.50, 0.50), (1.20, 0.40), (0.20, 0.07)),
    ),
    # --- Abdomen -------------------------------------------------------------------------------------------------
    # T1 and T2 of liver, spleen, kidney (cortex), muscle and fat: de Bazelaire et al., Radiology 2004, six volunteers:
    # ✓ at 3 T, † at 1.5 T (of liver, Meloni et al., MAGMA 2024 ✓ agree: 0.44–0.71 s and 35–54 ms). Vessels: blood.
    # Water ours. ADC of liver, spleen, kidney: medians of Jafar et al., World J Radiol 2016 ✓; spreads of liver and
    # spleen: Müller et al., Radiology 1994 ✓; of kidney ours.
    # T2* of liver at 1.5 T: R2* = 28.7 ± 2.7 1/s, Obrzut et al., Sci Rep 2020 ✓; at 3 T half of it, by the line that
    # Ina et al., Acta Radiol 2018 ✓ found. All other T2* ours.
    "liver": _at_fields(
        pd=(0.75, 0.03),
        adc=(1.28e-3, 0.16e-3),
        t15=((0.586, 0.039), (0.046, 0.006), (0.0348, 0.0033)),
        t30=((0.809, 0.071), (0.034, 0.004), (0.0176, 0.0020)),
    ),
    "spleen": _at_fields(
        pd=(0.83, 0.02),
        adc=(0.85e-3, 0.15e-3),
        t15=((1.057, 0.042), (0.079, 0.015), (0.045, 0.010)),
        t30=((1.328, 0.031), (0.061, 0.009), (0.025, 0.006)),
    ),
    "kidney": _at_fields(
        pd=(0.83, 0.02),
        adc=(1.94e-3, 0.20e-3),
        t15=((0.966, 0.058), (0.087, 0.004), (0.055, 0.008)),
        t30=((1.142, 0.154), (0.076, 0.007), (0.035, 0.006)),
    ),
    # ADC ours, below the 1.99 ± 0.16 of Müller et al. 1994 ✓.
    "muscle": _at_fields(
        pd=(0.80, 0.02),
        adc=(1.50e-3, 0.15e-3),
        t15=((0.856, 0.061), (0.027, 0.008), (0.025, 0.004)),
        t30=((0.898, 0.033), (0.029, 0.004), (0.022, 0.004)),
    ),
    # T2* is that of several resonances together. ADC ours: triglycerides hardly diffuse.
    "fat": _at_fields(
        pd=(0.92, 0.02),
        adc=(0.05e-3, 0.02e-3),
        t15=((0.343, 0.037), (0.058, 0.004), (0.040, 0.006)),
        t30=((0.382, 0.013), (0.068, 0.004), (0.025, 0.005)),
    ),
    # Metastasis. T1 ours: metastases measured 1.757 ± 0.723 s and hepatocellular carcinoma 1.056 ± 0.292 s (Eur J
    # Radiol Open 2020;100312 ✓). T2 at 1.5 T: between the 76 ± 11 ms (Radiology 1994;193:43 ✓) and 85 ± 17 ms (Eur
    # Radiol 2002;12:2273 ✓) of malignant lesions; at 3 T ours. ADC of malignant lesions: Mungai et al., Medicine 2014
    # ✓; spread ours. T2* ours.
    "liver_lesion": _at_fields(
        pd=(0.85, 0.03),
        adc=(0.98e-3, 0.20e-3),
        t15=((1.25, 0.30), (0.080, 0.014), (0.050, 0.012)),
        t30=((1.50, 0.35), (0.070, 0.013), (0.035, 0.009)),
    ),
}
"""{tissue: {field in tesla: its properties}}."""
