"""The synthetic cohort: a MIMIC-CXR drawn by a program, so that every stage runs its real code without patient data.

Parts, and their sources
    `geometry`, `physics`  A point source, a diverging beam, and the path of each ray through solids whose chords have
        a closed form; NIST's attenuation coefficients at 60 keV (NISTIR 5632), scatter, quantum noise, detector blur,
        collimation; a display that compresses latitude and equalizes the histogram, as MIMIC-CXR-JPG's images are
        (Johnson et al., arXiv:1901.07042).
    `anatomy`, `skeleton`, `vessels`  Body wall, breasts, lungs, heart, great vessels, diaphragm, stomach gas; ribs,
        clavicles, scapulae, humeri, sternum, vertebrae; branching arteries after Murray's law, trachea and bronchi.
        Sizes after Felson (*Principles of Chest Roentgenology*), Gray's Anatomy, and Danzer 1919 for the
        cardiothoracic ratio.
    `findings`, `devices`, `canvas`, `image`  The CheXpert findings by severity, side and kind after the Fleischner
        Society's glossary (Radiology 2008;246:697), ten kinds of device, and a mask of each finding that shows. Lung
        Opacity takes in its children (consolidation, pneumonia, oedema, atelectasis, lesion), as in CheXpert's
        hierarchy (Irvin et al., arXiv:1901.07031).
    `disease`, `cohort`  Patients with conditions, whose findings come together, begin, worsen and fade over studies;
        views, dates, a split by patient. Label frequencies are near MIMIC-CXR's, but Enlarged Cardiomediastinum,
        Fracture, Lung Lesion, Pleural Other and Pneumothorax are raised to 4 to 8 %, so that a few hundred test
        images can score them.
    `labeler`, `narrative`, `opening`, `grammar`, `phrases`, `stock_phrases`  A radiologist who misses, hedges and
        suspects; a report in MIMIC's sections and look; labels read from the Impression, else the Findings, as 1, 0,
        -1 or empty, by two labelers with errors of their own.
    `layout`  All of it as files in the layout of MIMIC-CXR-JPG 2.0.0.

Left out
    No value, image or sentence comes from MIMIC-CXR or from any patient. Beam hardening, grids, stitched or rotated
    cassettes, foreign bodies, post-surgical anatomy, children, pregnancy and diseases outside the 14 labels (emphysema,
    fibrosis, hernia, scoliosis, free air, …) are missing; anatomy varies far less than in life, a lobe is an ellipsoid,
    a scapula a plate, and soft tissue has no texture. Devices are always well placed. Lateral images show findings more
    crudely than frontal ones, and rib fractures hardly at all. A model trained here knows nothing about real images,
    and its figures say that the code works, not how well it would do.
"""
