"""What the words of Open-i's coding and of reports mean in the structured findings that the renderer draws."""

import re

from scripts.synthetic.findings import OTHER

# MeSH head -> (pattern that the qualifiers have to match, finding, kind). Every row that fits gives a finding.
# Heads that the renderer has no drawing for (technical quality, kyphosis, stents, surgical clips...) have no row; a
# device is what the report calls it, else the commonest of its code.
MESH: tuple[tuple[str, str, str, str], ...] = (
    (r"cardiomegaly", r"", "Cardiomegaly", ""),
    (r"cardiac shadow|heart", r"enlarged", "Cardiomegaly", ""),
    (r"mediastinum", r"enlarged|prominent", "Enlarged Cardiomediastinum", ""),
    (r"aortic aneurysm", r"", "Enlarged Cardiomediastinum", ""),
    (
        r"opacity|density|infiltrate|airspace disease",
        r"^(?!.*(?:interstitial|reticular|diffuse|round|mediastinum))",
        "Lung Opacity",
        "patchy",
    ),
    (r"opacity|density", r"^(?=.*round)(?!.*mediastinum)", "Lung Lesion", "nodule"),
    (
        r"opacity|density|infiltrate|airspace disease|markings",
        r"interstitial|reticular|diffuse",
        "Lung Opacity",
        "interstitial",
    ),
    (
        r"lung diseases, interstitial|pulmonary fibrosis|cystic fibrosis|bronchiectasis",
        r"",
        "Lung Opacity",
        "interstitial",
    ),
    (r"nodule", r"", "Lung Lesion", "nodule"),
    (r"mass|cavitation|cysts", r"^(?!.*mediastinum)", "Lung Lesion", "mass"),
    (r"mass", r"mediastinum", "Enlarged Cardiomediastinum", ""),
    (r"pulmonary edema|heart failure|pulmonary congestion", r"", "Edema", ""),
    (r"consolidation", r"", "Consolidation", ""),
    (r"pneumonia|tuberculosis", r"", "Pneumonia", ""),
    (r"pulmonary atelectasis|volume loss", r"", "Atelectasis", ""),
    (r"pneumothorax|hydropneumothorax", r"", "Pneumothorax", ""),
    (r"pleural effusion|hydropneumothorax", r"", "Pleural Effusion", ""),
    (r"costophrenic angle|sulcus", r"blunted", "Pleural Effusion", ""),
    (r"thickening", r"pleura", "Pleural Other", "thickening"),
    (r"calcinosis", r"pleura", "Pleural Other", "plaque"),
    (r"fractures, bone", r"ribs|thorax", "Fracture", "rib"),
    (r"fractures, bone", r"clavicle", "Fracture", "clavicle"),
    (r"deformity", r"ribs", "Fracture", "rib"),
    (r"catheters, indwelling", r"", "Support Devices", "central line"),
    (r"implanted medical device", r"", "Support Devices", "pacemaker"),
    (r"tube, inserted", r"", "Support Devices", "endotracheal tube"),
    (r"aorta|aorta, thoracic", r"tortuous|enlarged|prominent", OTHER, "tortuous aorta"),
    (r"atherosclerosis", r"", OTHER, "aortic calcification"),
    (r"calcinosis", r"aorta", OTHER, "aortic calcification"),
    (r"calcified granuloma|granuloma|granulomatous disease", r"", OTHER, "granuloma"),
    (r"calcinosis", r"lung|hilum|lymph", OTHER, "granuloma"),
    (r"cicatrix", r"lung|apex|base|lobe|^$", OTHER, "scarring"),
    (r"lung", r"hyperdistention", OTHER, "hyperinflation"),
    (
        r"(?:pulmonary |bullous )?emphysema|pulmonary disease, chronic obstructive|lung, hyperlucent",
        r"",
        OTHER,
        "hyperinflation",
    ),
    (r"diaphragm", r"flattened", OTHER, "hyperinflation"),
    (r"lung", r"hypoinflation", OTHER, "low lung volumes"),
    (r"diaphragm", r"elevated", OTHER, "elevated diaphragm"),
    (r"diaphragmatic eventration", r"", OTHER, "elevated diaphragm"),
    (r"(?:thoracic |lumbar )?vertebrae|spine", r"degenerative", OTHER, "degenerative spine"),
    (r"osteophyte|spondylosis|hyperostosis, diffuse idiopathic skeletal", r"", OTHER, "degenerative spine"),
    (r"scoliosis", r"", OTHER, "scoliosis"),
    (r"hernia, hiatal", r"", OTHER, "hiatal hernia"),
)

# Incidental findings in a report's own words; the labeler's cues decide whether they are there.
INCIDENTAL = {
    "tortuous aorta": r"(?:tortuous|ectatic|unfolded|uncoiled)[\w ]* aorta|aort[\w ]* (?:tortuous|ectatic|tortuosity)"
    r"|(?:tortuosity|ectasia) of the[\w ]* aorta",
    "aortic calcification": r"atherosclero\w+|calcifi\w+[\w ]* aort\w+|aort\w+[\w ]* calcifi\w+",
    "granuloma": r"granulomas?\b|granulomatous",
    "scarring": r"\bscar(?:s|ring)?\b",
    "hyperinflation": r"hyperinflat\w+|hyperexpan\w+|emphysema\w*|copd"
    r"|flatten\w+ (?:of )?(?:the )?(?:hemi)?diaphragm\w*",
    "low lung volumes": r"low lung volumes?|hypoinflat\w+|shallow inspiration|low volumes?",
    "elevated diaphragm": r"elevat\w+[\w ]* (?:hemi)?diaphragm\w*|eventration",
    "degenerative spine": r"degenerative|osteophyt\w+|spondylosis|spurring",
    "scoliosis": r"scolio\w+|dextroscoliosis|levoscoliosis",
    "hiatal hernia": r"hiatal hernia",
}

# Kind of a finding by the words around it, the first that fits; no word, no kind.
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "Lung Opacity": (("interstitial", r"interstitial|reticul|fibro|diffuse"), ("patchy", r"")),
    "Lung Lesion": (("mass", r"\bmass|carcinoma|tumou?r|neoplasm|cavitary"), ("nodule", r"")),
    "Pleural Other": (("plaque", r"plaque|calcif"), ("thickening", r"")),
    "Fracture": (("clavicle", r"clavic"), ("rib", r"\brib|thora")),
    "Support Devices": (
        ("pacemaker", r"pacemaker|\bpacer|\ba?icds?\b|defib|generator"),
        ("port", r"\bport\b|port-?a-?cath|mediport|chemoport"),
        ("central line", r"\bpicc\b|catheter|central (?:venous )?line|\blines?\b|jugular|subclavian"),
        ("sternal wires", r"sternotomy|stern\w+ wires?|cabg|bypass"),
        ("endotracheal tube", r"endotracheal|\bet tube|\bett\b|tracheostomy"),
        ("nasogastric tube", r"nasogastric|enteric|orogastric|\bng tube|feeding tube|dobbhoff"),
        ("chest tube", r"chest tube|thoracostomy|pigtail"),
    ),
}

# Attribute -> value -> words; the first that fits. Severity words stand in for a size where the renderer asks for one.
ATTRIBUTE_WORDS: dict[str, dict[str, str]] = {
    "side": {
        "bilateral": r"bilateral|\bboth\b|biapical|bibasilar|bibasal",
        "left": r"\bleft|lingula|\bdextroscol",
        "right": r"\bright|middle lobe|\blevoscol",
    },
    "zone": {
        "upper": r"upper|\bapex\b|apical|apices",
        "mid": r"\bmid\b|mid-?lung|middle|lingula|hil(?:um|ar)",
        "lower": r"lower|\bbase|basilar|basal|retrocardiac|costophrenic|diaphragm",
    },
    "size": {
        "large": r"large|severe|massive|marked",
        "moderate": r"moderate",
        "small": r"small|mild|minimal|tiny|trace|blunt|slight|subsegmental|streaky|focal",
    },
    "severity": {
        "severe": r"severe|massive|marked|large",
        "moderate": r"moderate",
        "mild": r"mild|borderline|minimal|slight|small|prominent|upper limits",
    },
}
_COMPILED = {
    name: {value: re.compile(words) for value, words in values.items()} for name, values in ATTRIBUTE_WORDS.items()
}


def kind_by_words(finding: str, words: str) -> str:
    """The kind of ``finding`` that ``words`` (lower case) speak of, or ""."""
    return next((kind for kind, pattern in KINDS.get(finding, ()) if re.search(pattern, words)), "")


def attributes_by_words(words: str) -> dict[str, str]:
    """Side, zone, size and severity that ``words`` (lower case) speak of."""
    found = {}
    for name, values in _COMPILED.items():
        sided = name == "side" and values["left"].search(words) and values["right"].search(words)
        value = "bilateral" if sided else next((value for value, cue in values.items() if cue.search(words)), None)
        if value:
            found[name] = value
    return found
