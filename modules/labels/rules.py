"""Phrase tables of the rule-based CheXpert-style labeler: what names, what negates and what doubts an observation.

Every entry is a regular expression over one lower-cased sentence with single spaces. The conventions are those of
the CheXpert labeler (Irvin et al., 2019, arXiv:1901.07031), which are not always what a radiologist means: a stable
heart size counts as uncertain, any "contour" as a mention of the cardiomediastinum, an endplate as a device.
"""

Table = str | dict[str, str] | tuple[tuple[str, str, int], ...]

# The tables below that make up the labeler.
TABLES = (
    "FINDINGS", "ANATOMY", "NOT_MENTIONS", "WEAK_MENTIONS", "OTHER_FINDINGS", "SCOPE_END", "NEGATION_BEFORE",
    "UNCERTAIN_BEFORE", "UNCERTAIN_AFTER", "NEGATION_AFTER", "DENIED_AFTER", "NORMAL", "NOT_NORMAL",
    "STABLE", "STABLE_BEFORE_NORMAL", "ENLARGED", "CONVENTIONS",
)  # fmt: skip

CLASSES = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

# Child -> parent in the observations' hierarchy (Irvin et al., 2019, figure 1), children before their parents' parents.
PARENTS = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Pneumonia": "Consolidation",
    "Consolidation": "Lung Opacity",
    "Lung Lesion": "Lung Opacity",
    "Edema": "Lung Opacity",
    "Atelectasis": "Lung Opacity",
}

# Words that name something abnormal by themselves: positive unless negated or doubted.
FINDINGS = {
    "Cardiomegaly": r"cardiomegaly|cardiac enlargement|enlarged heart|enlargement of the (?:heart|cardiac)",
    "Lung Lesion": r"\bmass(?:es|like)?\b|\bnodules?\b|nodular (?:densit|opaci)\w+|\blump\w*"
    r"|cavitary lesions?|carcinomas?|neoplasms?|tumou?rs?\b",
    "Lung Opacity": r"opaci\w+|air ?-?space disease|infiltrat\w+|interstitial (?:marking|pattern|lung)\w*"
    r"|reticula(?:r (?:marking|pattern)\w*|tion)|\bscar(?:s|ring)?\b|(?:peribronchial|wall) thickening"
    r"|increased densit\w+",
    "Edema": r"edema|heart failure|\bchf\b|(?:vascular|pulmonary) congestion|vascular prominence",
    "Consolidation": r"consolidat\w+",
    "Pneumonia": r"pneumonias?\b|infecti\w+",
    "Atelectasis": r"atelecta\w+|\bcollapse\b",
    "Pneumothorax": r"pneumothora\w+",
    "Pleural Effusion": r"effusions?|pleural fluid",
    "Pleural Other": r"pleural thickening|fibrosis|fibrothorax|pleural (?:parenchymal )?scar\w*",
    "Fracture": r"fractur\w+",
    "Support Devices": r"pacer|pacemaker|\ba?icds?\b|defib|device|\bvalves?\b|\blines?\b|\bpicc\b|tube|catheter|cannula"
    r"|\bdrains?\b|port-a-cath|mediport|\bcoils?\b|\bmarkers?\b|hardware|screw|\brods?\b|plate|arthroplast|tubercul"
    r"|support (?:apparatus|equipment)",
}

# Anatomy whose size or outline is reported: its label follows from "normal", "stable" or "enlarged" beside it.
ANATOMY = {
    "Enlarged Cardiomediastinum": r"(?<=\s)mediastinum|mediastinal (?:silhouette|configuration)s?"
    r"|cardiomediastinal silhouettes?|contours?\b",
    "Cardiomegaly": r"(?<!over )(?<!behind )\bthe heart\b|\bheart size|cardiac (?:silhouette|size|contour)s?",
}

# Phrases that look like a mention and are none.
NOT_MENTIONS = {"Lung Lesion": r"calcified nodules?", "Pleural Effusion": r"pericardial effusions?"}

# Mentions that no more than suggest the observation: uncertain where another would be positive.
WEAK_MENTIONS = {"Edema": r"congestion|vascular prominence"}

# Findings outside the classes: they say nothing about the 13 observations, and they rule out No Finding.
OTHER_FINDINGS = (
    r"granuloma|degenerat|atheroscle|emphysem|calcifi|(?<!clear and )hyperinflat(?!ed but clear)|hyperexpansion"
    r"|eventration|adenopathy|lymph|bronchiecta|density|hernia|blunt|\bcopd\b|osteopeni|osteodystroph|elevat|kypho"
    r"|prominen|fullness|scoliosis|deformity|bulla|azygos fissure|foreign bod|bullet|tracheostomy|aneurysm"
    r"|pneumo(?:mediastin|periton)|free (?:intraperitoneal |subdiaphragmatic )?air|ha?ematoma|ha?emorrhag|contusion"
    r"|dislocation|sarcoid|pleural plaque|volume loss|\bcavit(?:y|ies)\b"
)

# A cue reaches to the end of its sentence, but not over these.
SCOPE_END = (
    r"[;:(]|(?:,|\band) there (?:is|are)\b|\b(?:but|however|although|though|except)\b"
    r"|, (?=(?:findings?|this|these|which|consistent|compatible|suggest\w*|likely|possibl[ey]|probabl[ey])\b)"
    r"|\b(?:and|which|that) (?=(?:may|might|could|likely|probably|possibly)\b)"
    r"|, (?!(?:or|and|nor)\b)(?=[^,]*\b(?:(?:is|are) (?:again|still|unchanged|stable|new)|remains?|persists?)\b)"
)
# Cues before a finding; those that end in $ must stand right before it. "No change" keeps what was there.
NEGATION_BEFORE = (
    r"\b(?:(?:no|without)(?! (?:\w+ ){0,2}change)|not(?! seen on (?:the )?(?:prior|previous|lateral))|nor"
    r"|neither|negative for|free of|clear of|absen(?:t|ce of)|rather than)\b"
    r"|\bclear $|\b(?:resol(?:ved|ution of)|remov(?:ed|al of)) (?:(?!with\b)[\w-]+ )*$"
)
UNCERTAIN_BEFORE = (
    r"\b(?:may|might|could|possibl[ey]|probabl[ey]|likely|perhaps|suspicious for|suspect\w*|suspicion"
    r"|concern\w*|question(?:able|ed| of)|worrisome|equivocal|presum\w*|potential\w*|differential|consider\b"
    r"|exclud(?:e[sd]?|ing)|rul(?:es?|ed|ing) out|r / o|(?:evaluat\w+|assess\w*|correlat\w+) for"
    r"|no (?:significant |interval |definite )+change in|(?:versus|vs|or)(?: \w+){0,2} $)|/ $"
)
# Cues after a finding; those that begin with ^ must stand right after it.
UNCERTAIN_AFTER = (
    r"^ (?:(?:versus|vs|or)\b|/)"
    r"|\b(?:(?:cannot|can not|could not|not)(?: \w+){0,2} (?:excluded|ruled out)|difficult to exclude"
    r"|(?:is|are) (?:possible|suspected|questioned|(?:\w+ )?(?:un|less )?likely|(?:in|on) the differential)"
    r"|suspected|questioned|may not be (?:seen|\w+ed))\b|\?"
)
_NOT_THERE = (
    r"(?:not (?:\w+ )?(?:seen|identified|visuali[sz]ed|present|demonstrated|evident|appreciated|noted|found|detected)"
    r"(?! on (?:the )?(?:lateral|frontal|prior|previous))|no longer|absent|removed|resolved|cleared)\b"
)
NEGATION_AFTER = (
    rf"^(?: \w+)? {_NOT_THERE}|\b(?:has|have|had)(?: been)? (?:\w+ )?(?:removed|resolved|cleared|ruled out)\b"
)
# Right after a finding or the list that it ends, "... or effusion is not seen", and the answer "Pneumothorax: none."
# These outrank a doubt before the finding; the other cues after it do not.
DENIED_AFTER = (
    rf"(?:(?:,(?: [\w-]+){{1,3}})*,? (?:or|and|nor)(?: [\w-]+){{1,3}})?(?: \w+)? (?:is|are|was|were) {_NOT_THERE}"
    r"|s? ?[:=] ?(?:no|none|absent|negative|nil)\b(?! change)"
)

# What a sentence says of the heart and mediastinum. "Upper limits of normal" is normal only after "at the".
NORMAL = r"\b(?:normal|unremarkable|(?:is|are) clear|not (?:\w+ )?(?:enlarged|widened))\b"
NOT_NORMAL = (
    r"(?<!at the)(?<!at)(?<!within)(?: upper| top| first) limits? of normal|at top limits"
    r"|of the limits of normal|upper limits normal|appears? normal limits|at the upper limits of normal size"
    r"|\bha(?:s|ve) (?:a |become )?normal"
    r"|\b(?:enlarged|large|increased|prominent)(?: in size)? (?:with|and|but) [^,]*normal"
)
STABLE = r"\b(?:stable|unchanged|borderline (?:heart|cardiac))\b"
STABLE_BEFORE_NORMAL = (
    r"\b(?:is|are|appears?|remains?) (?:\w+ )?(?:stable|unchanged) and within"
    r"|\bstable, normal|\bstable with normal"
)
# These outrank "stable" for the class that they are about.
ENLARGED = {
    "Enlarged Cardiomediastinum": r"\bwidening of\b",
    "Cardiomegaly": r"(?<!stable )\benlarged\b|\b(?:large|increased|enlargement)\b",
}

# Slips of the CheXpert labeler's parser, in terse sentences above all: (class, pattern, label).
CONVENTIONS = (
    ("Cardiomegaly", r"\bthe heart size(?: size)? and .*\bappear\b", 1),
    ("Cardiomegaly", r"\bthe heart pulmonary\b|\btechnical factors heart size\b|\bheart size xxxx within", 1),
    ("Cardiomegaly", r"\band [a-z ]* not enlarged", 1),
    ("Enlarged Cardiomediastinum", r"mediastinum (?:of|within) normal", 1),
    ("Enlarged Cardiomediastinum", r"normal heart size mediastinal", 1),
    ("Enlarged Cardiomediastinum", r"stable cardiomediastinal silhouette with normal", -1),
    ("Enlarged Cardiomediastinum", r"with stable (?:appearance of the )?cardiomediastinal", -1),
    ("Enlarged Cardiomediastinum", r"the heart and (?:cardio)?mediastinal [a-z ]*(?:stable|unchanged)", 1),
    ("Enlarged Cardiomediastinum", r"silhouette stable\W*$", 1),
    ("Enlarged Cardiomediastinum", r"cardiomegaly and mediastinal", 1),
    ("Pneumonia", r"^no (?:\w+ )+to suggest [^.]*pneumonia", 1),
    ("Pleural Effusion", r"^no (?:\w+ )+to suggest [^.]*effusion", 1),
    ("Fracture", r"^no [^.]*\b(?:displaced|thoracic) \w+ [^.]*fractures(?! (?:is|are))", 1),
    ("Lung Opacity", r"^no \w+ air space opacities\W*$", 1),
    ("Consolidation", r"^no \w+ air ?space consolidations\W*$", 1),
    ("Consolidation", r"^no \w+ airspace consolidation or \w+\W*$", -1),
    ("Consolidation", r"^no (?:[\w ]+, )+or \w+ air space consolidation\W*$", 1),
    ("Pneumothorax", r"^no pleural effusions or pneumothorax\W*$", 1),
    ("Pneumothorax", r"^no(?: \w+){2} (?:consolidation|collection) or \w+\W*$", -1),
    ("Pleural Effusion", r"^no(?: \w+){2} consolidation or \w+\W*$", -1),
)
