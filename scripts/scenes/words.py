"""The words that text pictures print, and the short ones that charts are labelled with."""

from __future__ import annotations

WORD_LINES = """
able acid also apple area army away baby back ball band bank base bath bear beat bell belt best bird blue boat body
bone book boot born both bowl bread brick bring brush build cake call calm camp card care case cash cave cent chair
chalk cheap check cheese chest chief child city clay clean clear clock cloud club coach coast coat code cold cook
cool copper corn cost cotton cream crown cup dance dark data date dawn deal dear deep deer desk diary dinner dish
doctor door down draw dream dress drink drive drum duck dust eagle early earth east easy edge eight empty engine
enter even event exit extra face fact fair fall family farm fast father feet field film find fine fire fish five
flag flat floor flour flower food foot forest fork form four fresh friend frog front fruit full game garden gate
gift girl give glass goat gold good grain grape grass great green group guest guide hair half hall hand happy hard
hat head heart heat help here high hill hold home honey hope horse hotel hour house ice idea inch iron island item
jacket jam join joke juice jump just keep key kind king kitchen knee knife lake lamp land large last late leaf learn
left lemon letter light lime line lion list little live lock long lorry loud love low lucky lunch magic mail main
map mark market meal meat melon metal middle milk mind mint mirror money month moon more morning mother mouse mouth
music nail name near neck nest news next night nine noise north nose note number nurse ocean offer office oil olive
open orange oven over page paint pair paper park part path pear pen people pepper phone piano pie pilot pink pizza
plan plant plate play please plum pocket point pond pool post potato press price queen quick quiet rabbit radio rain
read ready rest rice rich right ring river road rock roof room rope rose round salad sale salt sand school sea seat
seed seven shell ship shirt shoe shop short silk silver sister sleep slow small smile snow soap soft song soup south
spoon spring square stamp star start station stone stop store storm street sugar summer sun sweet swim table tail
tall taxi tea team tent test ticket tiger time toast today tomato tooth tower town toy train tree truck trust turn
uncle under urban useful valley van village visit voice wait walk wall warm watch water wave west wheel white wild
wind window winter wolf wood wool word work world yard year yellow young zebra zero
"""

CHART_WORD_LINES = """
cat dog fox hen cow pig bee tea milk rice corn egg ham nut fig kiwi lime pear plum Mon Tue Wed Thu Fri Sat Sun Jan Feb
Mar Apr May Oct bus car bike tram ship
"""

WORDS: tuple[str, ...] = tuple(WORD_LINES.split())
CHART_WORDS: tuple[str, ...] = tuple(CHART_WORD_LINES.split())
