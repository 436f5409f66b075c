"""What each finding is called: usual and rarer wordings, in whole sentences and in telegram style.

Phrases name only what a drawing shows. A phrase of one CheXpert class avoids the words by which labelers find another
("opacity" is kept for Lung Opacity), so that the labels of a report can be read off its findings. Slots in braces are
filled by reports.slots().
"""

Wordings = tuple[str, ...]  # the usual one first

# (finding, kind) -> wordings in whole sentences, wordings in telegram style
PHRASES: dict[tuple[str, str], tuple[Wordings, Wordings]] = {
    ("Enlarged Cardiomediastinum", ""): (
        (
            "The mediastinum is {severely} widened.",
            "There is {severity} widening of the superior mediastinum.",
            "Mediastinal silhouette appears {severely} prominent and widened.",
        ),
        ("{severity} widening of the mediastinum.", "Mediastinal contour {severely} widened."),
    ),
    ("Cardiomegaly", ""): (
        (
            "The heart is {severely} enlarged.",
            "There is {severity} cardiomegaly.",
            "The cardiac silhouette is {severely} increased in size with a transverse diameter above half of the "
            "chest.",
        ),
        ("{severity} cardiomegaly.", "Heart size {severely} enlarged."),
    ),
    ("Lung Opacity", "patchy"): (
        (
            "There {is_a} {size} patchy opacity {in_where}.",
            "A {size} hazy opacity is seen {in_where}.",
            "Ill defined {size} airspace opacity {in_where} may represent an early infiltrate.",
        ),
        ("{size} patchy opacity {in_where}.", "{where} hazy opacity."),
    ),
    ("Lung Opacity", "interstitial"): (
        (
            "There are {severity} interstitial opacities in {lung}.",
            "Reticular markings are {severely} increased in {lung}.",
            "{severity} chronic appearing interstitial markings are scattered throughout {lung}.",
        ),
        ("{severity} interstitial opacities in {lung}.", "{severity} reticular pattern in {lung}."),
    ),
    ("Lung Lesion", "nodule"): (
        (
            "There {is_a} {measure} nodule {in_where}.",
            "A {measure} round nodule projects {over_where}, CT may be helpful.",
            "Solitary {measure} nodule {in_where}, comparison with old films is suggested.",
        ),
        ("{measure} nodule {in_where}.", "{where} nodule, {measure}."),
    ),
    ("Lung Lesion", "mass"): (
        (
            "There {is_a} {measure} mass {in_where} concerning for malignancy.",
            "A {measure} lobulated mass is seen {in_where}, CT is recommended.",
            "{measure} mass {in_where} highly suggestive of a neoplasm.",
        ),
        ("{measure} mass {in_where}, recommend CT.", "{where} mass."),
    ),
    ("Edema", ""): (
        (
            "There is {severity} pulmonary edema with prominent central vessels.",
            "Vascular congestion is noted with {severity} interstitial edema and septal thickening.",
            "Perihilar haze and engorged vessels indicate {severity} edema from heart failure.",
        ),
        ("{severity} pulmonary edema.", "{severity} edema with vascular congestion."),
    ),
    ("Consolidation", ""): (
        (
            "There is {extent} consolidation {in_where} with air bronchograms.",
            "{extent} consolidation is present {in_where}.",
            "Dense {extent} consolidation obscures the vessels {in_where}.",
        ),
        ("{extent} consolidation {in_where}.", "{where} consolidation with air bronchograms."),
    ),
    ("Pneumonia", ""): (
        (
            "There are {fluffy} densities {in_where} compatible with pneumonia.",
            "Findings {in_where} are consistent with {fluffy} pneumonia.",
            "{fluffy} bronchopneumonia {in_where}, followup to resolution is advised.",
        ),
        ("{fluffy} pneumonia {in_where}.", "{where} pneumonia."),
    ),
    ("Atelectasis", ""): (
        (
            "There is {amount} atelectasis {at_where}.",
            "Bandlike densities {at_where} represent {amount} atelectasis.",
            "{amount} subsegmental atelectasis with volume loss {at_where}.",
        ),
        ("{amount} atelectasis {at_where}.", "{amount} {basilar} atelectasis."),
    ),
    ("Pneumothorax", ""): (
        (
            "There {is_a} {size} {side} pneumothorax.",
            "A {size} {side} pneumothorax is present with a visible pleural edge.",
            "{size} {side} pneumothorax with retraction of the lung, the clinical team was notified.",
        ),
        ("{size} {side} pneumothorax.", "{side} pneumothorax, {size}."),
    ),
    ("Pleural Effusion", ""): (
        (
            "There {is_a} {size} {side} pleural effusion{s}.",
            "Blunting of the {side} costophrenic {angle} is due to {a} {size} pleural effusion{s}.",
            "{size} {side} pleural effusion{s} layering posteriorly on the lateral view.",
        ),
        ("{size} {side} pleural effusion{s}.", "{side} pleural effusion{s}, {size}."),
    ),
    ("Pleural Other", "thickening"): (
        ("There is {side} {apical} pleural thickening.", "Pleural thickening is noted at the {side} {apex}."),
        ("{side} {apical} pleural thickening.", "Pleural thickening, {side} {apex}."),
    ),
    ("Pleural Other", "plaque"): (
        (
            "There is {side} pleural thickening with calcified plaques.",
            "Calcified plaques and pleural thickening along the {side} chest wall{s} indicate asbestos exposure.",
        ),
        ("{side} calcified pleural thickening.", "Calcified plaques, {side} pleural thickening."),
    ),
    ("Fracture", "rib"): (
        (
            "There {is_a} displaced fracture{s} of {a} {side} {rib_zone} rib{s}.",
            "A displaced {side} {rib_zone} rib fracture is seen.",
            "Deformity of {a} {side} {rib_zone} rib{s} from acute fracture.",
        ),
        ("Displaced {side} {rib_zone} rib fracture{s}.", "{side} {rib_zone} rib fracture{s}."),
    ),
    ("Fracture", "clavicle"): (
        ("There {is_a} displaced fracture{s} of the {side} clavicle{s}.", "The {side} clavicle{s} {is_} fractured."),
        ("Displaced {side} clavicle fracture{s}.", "{side} clavicle fracture{s}."),
    ),
    ("Support Devices", "pacemaker"): (
        (
            "A {side} chest pacemaker is in place with leads in the right atrium and ventricle.",
            "{side} sided dual lead pacemaker is unchanged.",
            "{side} subclavian pacemaker generator with intact leads.",
        ),
        ("{side} pacemaker in place.", "{side} chest pacemaker with two leads."),
    ),
    ("Support Devices", "central line"): (
        (
            "A {side} central venous catheter has its tip in the SVC.",
            "{side} central line terminates in the SVC.",
            "{side} internal jugular catheter tip overlies the superior vena cava.",
        ),
        ("{side} central line tip in SVC.", "{side} central venous catheter."),
    ),
    ("Support Devices", "port"): (
        ("A {side} chest port has its catheter tip in the SVC.", "{side} sided chest port catheter is in place."),
        ("{side} chest port catheter in place.", "{side} port catheter tip in SVC."),
    ),
    ("Support Devices", "sternal wires"): (
        ("Median sternotomy hardware is intact.", "Sternal wires and hardware from bypass surgery are noted."),
        ("Sternotomy hardware intact.", "Postoperative sternal hardware."),
    ),
    ("Support Devices", "endotracheal tube"): (
        ("The endotracheal tube tip is above the carina.", "An endotracheal tube is in good position."),
        ("Endotracheal tube above the carina.", "ET tube in good position."),
    ),
    ("Support Devices", "nasogastric tube"): (
        ("A nasogastric tube extends into the stomach.", "The nasogastric tube tip projects over the stomach."),
        ("Nasogastric tube in stomach.", "NG tube tip below the diaphragm."),
    ),
    ("Support Devices", "chest tube"): (
        ("A {side} chest tube is in place.", "A {side} sided thoracostomy tube is present."),
        ("{side} chest tube in place.", "{side} chest tube."),
    ),
    ("Other", "tortuous aorta"): (
        ("The thoracic aorta is tortuous.", "There is tortuosity and ectasia of the aorta."),
        ("Tortuous aorta.", "Aorta is ectatic and tortuous."),
    ),
    ("Other", "aortic calcification"): (
        (
            "There is atherosclerotic calcification of the aortic arch.",
            "Vascular calcifications are present in the aortic knob.",
        ),
        ("Calcified aortic arch.", "Atherosclerotic aorta."),
    ),
    ("Other", "granuloma"): (
        (
            "There {is_a} calcified granuloma {in_where}.",
            "A dense calcified granuloma projects {over_where}.",
            "Calcified granuloma {in_where} from old granulomatous disease.",
        ),
        ("Calcified granuloma {in_where}.", "{where} calcified granuloma."),
    ),
    ("Other", "scarring"): (
        ("There is fibrotic stranding {in_where}.", "Chronic fibrotic change is noted {in_where}."),
        ("Fibrotic stranding {in_where}.", "{where} fibrotic change."),
    ),
    ("Other", "hyperinflation"): (
        (
            "The lungs are hyperexpanded with flattened diaphragms.",
            "The lungs are hyperinflated, compatible with emphysema.",
        ),
        ("Hyperinflated lungs.", "Hyperexpanded lungs with flat diaphragms."),
    ),
    ("Other", "low lung volumes"): (
        ("Lung volumes are low.", "There is hypoinflation of the lungs."),
        ("Low lung volumes.", "Hypoinflated lungs."),
    ),
    ("Other", "elevated diaphragm"): (
        ("There is elevation of the {side} hemidiaphragm.", "The {side} hemidiaphragm is elevated."),
        ("Elevated {side} hemidiaphragm.", "{side} hemidiaphragm elevation."),
    ),
    ("Other", "degenerative spine"): (
        (
            "There are degenerative changes of the thoracic spine.",
            "Osteophytes are present throughout the thoracic spine.",
            "Multilevel spurring of the thoracic spine.",
        ),
        ("Degenerative changes in the spine.", "Thoracic spondylosis."),
    ),
    ("Other", "scoliosis"): (
        ("There is scoliosis of the thoracic spine convex to the {side}.", "The thoracic spine curves to the {side}."),
        ("{side} convex scoliosis.", "Scoliosis convex {side}."),
    ),
    ("Other", "hiatal hernia"): (
        (
            "There is a {size} hiatal hernia behind the heart.",
            "A {size} hiatal hernia is seen with an air fluid level.",
        ),
        ("{size} hiatal hernia.", "Retrocardiac hiatal hernia."),
    ),
}

# What a negation denies, and the classes whose presence forbids it.
DENIED = {
    "focal consolidation": {"Consolidation", "Pneumonia", "Lung Opacity"},
    "focal airspace disease": {"Consolidation", "Pneumonia", "Lung Opacity"},
    "focal infiltrate": {"Consolidation", "Pneumonia", "Lung Opacity"},
    "pneumonia": {"Consolidation", "Pneumonia", "Lung Opacity"},
    "pleural effusion": {"Pleural Effusion"},
    "large pleural effusion": {"Pleural Effusion"},
    "pleural fluid collection": {"Pleural Effusion"},
    "effusion": {"Pleural Effusion"},
    "pneumothorax": {"Pneumothorax"},
    "edema": {"Edema"},
    "nodules": {"Lung Lesion"},
    "suspicious mass": {"Lung Lesion"},
    "masses": {"Lung Lesion"},
    "adenopathy": set(),
}
