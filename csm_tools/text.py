"""Normalize typed text into the words to speak, and split it into sentences with pauses.

    spoken(text) -> text                       # numbers, signs, markdown and emoji in words; English
    sentences(text, longest=240) -> [(part, seconds of silence after it)]

| typed | said |
|---|---|
| 42; 1,234.5; .5; 007 | forty-two; one thousand two hundred thirty-four point five; point five; zero zero seven |
| 21st; 1/2, 2½ cups; 8/10 | twenty-first; one half, two and a half cups; eight out of ten |
| in 1984; the 1990s; '60s | in nineteen eighty-four; the nineteen nineties; sixties |
| 2026-08-17; 8/17/2026; Aug. 17 | August seventeenth, twenty twenty-six (both); August seventeenth |
| 10:30 am; 14:00; 9-5pm | ten thirty A M; fourteen hundred; nine to five P M |
| $3.50; £5-10; $3.2M | three dollars and fifty cents; five to ten pounds; three point two million dollars |
| 5%; 60 km/h; -5°C; 3x | five percent; sixty kilometers per hour; minus five degrees Celsius; three times |
| 10-20; 1914-1918; won 3:1 | ten to twenty; nineteen fourteen to nineteen eighteen; won three to one |
| 555-123-4567; v1.2.3; GPT-4 | five five five, one two three, ...; version one point two point three; GPT four |
| Henry VIII; World War II | Henry the eighth; World War two |
| Dr. Smith; Main St.; e.g.; No. 5 | Doctor Smith; Main Street; for example; number five |
| a@b.com; https://b.com/c | a at b dot com; b dot com slash c |
| R&D; #1; 2 + 2 = 4; a -> b | R and D; number one; two plus two equals four; a, b |
| (so); [so]; so — so; “so” | , so,; , so,; so, so; "so" |
| STOP DOING THAT! | Stop doing that! |
| # Title, **bold**, `code`, [link](url), - item, > quote, tables, rules | their words, each on its line |
| emoji, :-), HTML tags and entities | nothing (or, by an option, the emoji's name); their characters |

spoken() is idempotent. It takes linear time: every quantifier in a pattern that may start anywhere is bounded, or ends
at a character that starts the pattern again. It keeps what it does not know, and lines mostly in another script.
"""

import html
import logging
import re
import unicodedata
from functools import cache

# ------------------------------------------------------------------------------------- numbers

ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {10**12: "trillion", 10**9: "billion", 10**6: "million", 10**3: "thousand", 100: "hundred"}
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip


def cardinal(n):
    """123 -> one hundred twenty-three. Numbers beyond trillions are read digit by digit."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n >= 10**15:
        return digits(str(n))
    scale, name = next((scale, name) for scale, name in SCALES.items() if n >= scale)
    rest = f" {cardinal(n % scale)}" if n % scale else ""
    return f"{cardinal(n // scale)} {name}{rest}"


def ordinal(n):
    """21 -> twenty-first"""
    head, last = re.fullmatch(r"(.*?)([a-z]+)", cardinal(n)).groups()
    if last.endswith("y"):
        return f"{head}{last[:-1]}ieth"
    return head + ORDINALS.get(last, last.removesuffix("t") + "th")


def plural(word):
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}es" if word.endswith(("s", "x", "ch")) else f"{word}s"


def spelled(text):
    """7f3 -> seven F three; other signs are dropped."""
    return " ".join(ONES[int(c)] if c in DIGITS else c.upper() for c in text if c.isalnum())


def in_pairs(n):
    """380 -> three eighty; 105 -> one oh five; 2490 -> twenty-four ninety"""
    if n >= 1000 or n % 100 == 0:
        return year(n) if n >= 1000 else cardinal(n)
    return f"{ONES[n // 100]} {'oh ' if n % 100 < 10 else ''}{cardinal(n % 100)}"


def digits(text):
    """The text's digits one by one; other characters are dropped."""
    return " ".join(ONES[int(c)] for c in text if c in "0123456789")


def year(n):
    """1984 in two halves, 1905 with an "oh", 2000 to 2009 in full."""
    high, low = divmod(n, 100)
    if high % 10 == 0 and low < 10:
        return cardinal(n)
    return f"{cardinal(high)} " + ("hundred" if low == 0 else f"oh {ONES[low]}" if low < 10 else cardinal(low))


def number(text):
    """1,234.50 -> one thousand two hundred thirty-four point five zero; 007 digit by digit."""
    whole, point, decimals = text.replace(",", "").partition(".")
    if (len(whole) > 1 and whole[0] == "0") or (len(whole) > 9 and whole in text and not whole.endswith("000")):
        said = digits(whole)  # a code, not an amount
    else:
        said = cardinal(int(whole)) if whole else ""
    return f"{said} point {digits(decimals)}".strip() if point else said


def year_or_number(text):
    """Numbers from 1100 to 2099 are read as years."""
    return year(int(text)) if re.fullmatch("1[1-9][0-9]{2}|20[0-9]{2}", text) else number(text)


def fraction(over, under):
    """3/4 -> three quarters"""
    name = {2: "half", 4: "quarter"}.get(under) or ordinal(under)
    many = "halves" if under == 2 else f"{name}s"
    return f"one {name}" if over == 1 else f"{cardinal(over)} {many}"


# ------------------------------------------------------------------------------------- patterns and tables

MONTHS = """
January February March April May June July August September October November December
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,5}(?![0-9])|[0-9]{1,15})(?:\.[0-9]{1,15})?"
AMOUNT = rf"(?:{NUMBER}|\.[0-9]{{1,15}})"
MONTH = (
    r"(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b"
)
NTH = r"(?:st|nd|rd|th)"
YEAR = r"((?:1[0-9]|20)[0-9]{2})(?![0-9])"
HALF_DAY = r"([AaPp])\.?[Mm]\b(\.?)"
TO = r" ?(?:-|–|—|−) ?"
SIGN = r"(?:(?<![\w)%.-])(?P<sign>[-−+±~≈]) ?(?=[0-9.$£€¥₹]))?(?<![\w.])"
SIGNS = {"-": "minus ", "−": "minus ", "+": "plus ", "±": "plus or minus ", "~": "about ", "≈": "about "}

# symbol -> one, many, one hundredth, many hundredths
CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"), "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"), "¥": ("yen", "yen", "", ""), "₹": ("rupee", "rupees", "paisa", "paise"),
    "₩": ("won", "won", "", ""), "₽": ("ruble", "rubles", "kopeck", "kopecks"), "₿": ("bitcoin", "bitcoins", "", ""),
    "₺": ("lira", "lira", "", ""), "₪": ("shekel", "shekels", "", ""),
    "₦": ("naira", "naira", "", ""), "₱": ("peso", "pesos", "", ""), "฿": ("baht", "baht", "", ""),
    "₫": ("dong", "dong", "", ""), "₴": ("hryvnia", "hryvnias", "", ""), "¢": ("cent", "cents", "", ""),
}  # fmt: skip
COUNTRIES = {
    "US": "US ", "A": "Australian ", "AU": "Australian ", "C": "Canadian ", "CA": "Canadian ", "NZ": "New Zealand ",
    "HK": "Hong Kong ", "S": "Singapore ",
}  # fmt: skip
CODES = {
    "USD": "US dollars", "EUR": "euros", "GBP": "British pounds", "JPY": "Japanese yen", "CAD": "Canadian dollars",
    "AUD": "Australian dollars", "CHF": "Swiss francs", "INR": "Indian rupees", "CNY": "Chinese yuan",
}  # fmt: skip
LARGE = {
    "k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "B": "billion", "b": "billion",
    "bn": "billion", "Bn": "billion", "T": "trillion", "tn": "trillion", "thousand": "thousand", "million": "million",
    "billion": "billion", "trillion": "trillion", "lakh": "lakh", "crore": "crore",
}  # fmt: skip
LARGE_ = "|".join(sorted(LARGE, key=len, reverse=True))
# abbreviation -> singular; a space may precede it
UNITS = {
    "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "nm": "nanometer", "µm": "micrometer",
    "mi": "mile", "ft": "foot", "yd": "yard", "yds": "yard", "kg": "kilogram", "g": "gram", "mg": "milligram",
    "mcg": "microgram", "µg": "microgram", "lb": "pound", "lbs": "pound", "oz": "ounce", "l": "liter", "L": "liter",
    "ml": "milliliter", "mL": "milliliter", "dl": "deciliter",
    "dL": "deciliter", "µL": "microliter", "μL": "microliter", "mol": "mole", "mmol": "millimole", "ng": "nanogram",
    "sq mi": "square mile", "sq. mi.": "square mile", "sq. ft.": "square foot", "sq. ft": "square foot",
    "sq km": "square kilometer", "sq. m": "square meter", "sq yd": "square yard", "cu ft": "cubic foot",
    "cu. ft.": "cubic foot", "cu. ft": "cubic foot", "cu m": "cubic meter", "fl oz": "fluid ounce",
    "fl. oz.": "fluid ounce", "fl. oz": "fluid ounce", "cm2": "square centimeter",
    "ft2": "square foot", "cl": "centiliter", "tsp": "teaspoon",
    "tbsp": "tablespoon", "Tbsp": "tablespoon", "gal": "gallon", "qt": "quart", "pt": "pint", "Hz": "hertz",
    "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "W": "watt", "kW": "kilowatt", "MW": "megawatt",
    "GW": "gigawatt", "Wh": "watt hour", "kWh": "kilowatt hour", "MWh": "megawatt hour", "V": "volt", "mV": "millivolt",
    "kV": "kilovolt", "mA": "milliamp", "mAh": "milliamp hour", "kB": "kilobyte",
    "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte", "PB": "petabyte", "KiB": "kibibyte",
    "MiB": "mebibyte", "GiB": "gibibyte", "Mb": "megabit", "Gb": "gigabit", "h": "hour", "hr": "hour", "hrs": "hour",
    "min": "minute", "mins": "minute", "sec": "second", "secs": "second", "s": "second", "ms": "millisecond",
    "µs": "microsecond", "μs": "microsecond", "ns": "nanosecond", "wk": "week", "wks": "week", "mo": "month",
    "mos": "month", "yr": "year", "yrs": "year", "cal": "calorie", "kcal": "kilocalorie", "kJ": "kilojoule",
    "dB": "decibel", "pts": "point",
    "bbl": "barrel", "px": "pixel", "pt.": "point", "kPa": "kilopascal", "hPa": "hectopascal",
    "m²": "square meter", "km²": "square kilometer", "cm²": "square centimeter", "ft²": "square foot",
    "sq ft": "square foot", "sqft": "square foot", "sq m": "square meter", "m³": "cubic meter",
    "cm³": "cubic centimeter",
    "m2": "square meter", "km2": "square kilometer", "m3": "cubic meter", "°": "degree", "Å": "angstrom", "Ω": "ohm",
    "in.": "inch", "″": "inch", "′": "foot",
}  # fmt: skip
# the same, without a plural
FIXED = {
    "mph": "miles per hour", "km/h": "kilometers per hour", "kph": "kilometers per hour", "kmh": "kilometers per hour",
    "m/s": "meters per second", "m/s²": "meters per second squared", "kbps": "kilobits per second",
    "Mbps": "megabits per second", "Gbps": "gigabits per second", "MB/s": "megabytes per second",
    "GB/s": "gigabytes per second", "fps": "frames per second", "rpm": "R P M", "bpm": "beats per minute",
    "ppm": "parts per million",
    "psi": "P S I", "dpi": "D P I", "mpg": "miles per gallon",
}  # fmt: skip
TEMPERATURES = {"C": "Celsius", "F": "Fahrenheit"}  # without a degree sign, 20C but not 20 C
EACH = r"second|sec|s|minute|min|hour|hr|h|day|night|week|wk|month|mo|year|yr|person|capita|user|seat|share|mile"
PER = (
    rf"(?:/({EACH}|bbl|kg|km|lb|oz|g|l|L|mi|m[²³2]|m|km[²2]|cm[²³2]|ft[²2]|sq ft|dL|dl|mL|ml|µL|mol|kWh|MWh|GB|TB|W)"
    r"(?!\w)(?:\.(?=[,;:)]| [a-z]))?)?"
)
COUNTED = "cup teaspoon tablespoon pound ounce pint quart gallon liter mile inch hour day year page".split()

ROMAN = r"((?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3}))"
MONARCHS = """
Henry Louis Charles George James Edward Richard William John Paul Pius Benedict Gregory Leo Innocent Clement Alexander
Nicholas Peter Catherine Elizabeth Mary Philip Ferdinand Frederick Wilhelm Napoleon Ivan Otto Ramses Rameses Thutmose
Ptolemy Cleopatra Darius Xerxes Alfonso Carlos Felipe Gustav Haakon Harald Christian Margrethe Victor Umberto Francis
Leopold Albert Boniface Urban Sixtus Julius Adrian Stephen Emmanuel Maximilian Amenhotep Artaxerxes
""".split()
NUMBERED_NAMES = """
Chapter Part Act Scene Volume Vol Book War Section Article Phase Stage Type Class Title Appendix Level Tier Grade Bowl
Mark Figure Table Lesson Unit Canto Psalm Symphony Apollo Saturn Factor Schedule Annex
""".split()

TITLES = {
    "Dr": "Doctor", "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Prof": "Professor", "Messrs": "Messieurs",
    "Rev": "Reverend", "Fr": "Father", "Gen": "General", "Col": "Colonel", "Maj": "Major", "Capt": "Captain",
    "Cmdr": "Commander", "Lt": "Lieutenant", "Sgt": "Sergeant", "Adm": "Admiral", "Sen": "Senator",
    "Rep": "Representative", "Gov": "Governor", "Pres": "President", "Hon": "Honorable", "Mt": "Mount", "Ft": "Fort",
    "St": "Saint",
}  # fmt: skip
STREETS = {
    "St": "Street", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Ln": "Lane", "Dr": "Drive", "Ct": "Court",
    "Pl": "Place", "Hwy": "Highway", "Pkwy": "Parkway", "Sq": "Square",
}  # fmt: skip
AFTER_NAMES = {"Jr": "Junior", "Sr": "Senior", "Inc": "Incorporated", "Ltd": "Limited", "Co": "Company",
               "Corp": "Corporation", "Bros": "Brothers", "Dept": "Department", "Univ": "University"}  # fmt: skip
BEFORE_NUMBERS = {
    "no": "number", "nos": "numbers", "vol": "volume", "vols": "volumes", "fig": "figure", "figs": "figures",
    "ch": "chapter", "sec": "section", "art": "article", "pp": "pages", "p": "page", "pg": "page", "ext": "extension",
    "ca": "circa", "c": "circa", "est": "established", "eq": "equation", "eqs": "equations", "chap": "chapter",
    "chs": "chapters", "para": "paragraph", "paras": "paragraphs", "ll": "lines", "vv": "verses", "op": "opus",
    "apt": "apartment", "bldg": "building", "ste": "suite", "agg": "aggregate", "pop": "population",
    "elev": "elevation", "alt": "altitude", "temp": "temperature",
}  # fmt: skip
SHORT = {
    "e.g.": "for example", "eg.": "for example", "i.e.": "that is", "ie.": "that is", "etc.": "et cetera",
    "vs.": "versus", "cf.": "compare", "viz.": "namely", "approx.": "approximately", "a.k.a.": "also known as",
    "et al.": "and others", "dept.": "department", "appt.": "appointment", "misc.": "miscellaneous",
    "govt.": "government", "incl.": "including", "excl.": "excluding", "max.": "maximum", "min.": "minimum",
    "avg.": "average",
    "p.a.": "per annum", "pkg.": "package", "tel.": "telephone", "esp.": "especially",
    "w/o": "without", "w/in": "within", "w/": "with",
    "b/c": "because", "c/o": "care of",
}  # fmt: skip
BARE = {"eg": "for example", "ie": "that is", "etc": "et cetera", "vs": "versus", "aka": "also known as"}
JOINED = {"U.S.A.": "USA", "U.S.": "US", "U.K.": "UK", "E.U.": "EU", "U.N.": "UN", "D.C.": "DC", "Ph.D.": "PhD",
          "M.D.": "MD", "P.S.": "P S"}  # fmt: skip
EITHER = {"he/she": "he or she", "she/he": "she or he", "his/her": "his or her", "him/her": "him or her",
          "s/he": "she or he", "yes/no": "yes or no", "and/or": "and or", "n/a": "not applicable",
          "y/y": "year on year", "p/h": "per hour", "p/w": "per week", "p/m": "per month"}  # fmt: skip
VERSIONED = """
version Version release Python Java Node iOS macOS Android Ubuntu CUDA MLX PyTorch PHP Ruby Swift USB TLS Bluetooth
Windows
""".split()
TOP_LEVEL = "com org net edu gov io ai dev app co uk de fr eu ca au info tv xyz tech blog ch nl jp"
ENDINGS = """
py md txt json yaml yml toml html htm css js ts jsx tsx xml csv tsv pdf png jpg jpeg gif svg webp wav mp3 mp4 flac ogg
opus zip gz tar exe dll sh bat ini cfg conf log sql php rs cpp java ipynb docx xlsx pptx doc xls ppt epub safetensors
gguf
"""
# These stay in capitals. So do words of three letters or more without a vowel, which are spelled out.
ACRONYMS = """
USA UK EU UN FBI CIA NASA TV PC AI OK ID IT UI API GPU CPU URL HTML USB NATO UNESCO UNICEF IBM UFO EPA IRS AM PM IQ LA
""".split()
SHOUTED = """
THE AND YOU NOT IS ARE TO OF IN IT DO NO GO MY ME WE HE SHE FOR WITH THIS THAT STOP NOW OUT OFF ALL WHAT WHY HOW WHO
WHEN YES HELP PLEASE WAS CAN BE ON AT AN A SO UP BUT OR IF HAVE HAS LET GET YOUR
""".split()
OPERATORS = {
    "=": "equals", "==": "equals", "+": "plus", "×": "times", "÷": "divided by", "≠": "is not equal to",
    "!=": "is not equal to", "<": "is less than", ">": "is greater than", "≤": "is at most", "≥": "is at least",
    "<=": "is at most", ">=": "is at least", "≈": "is about", "±": "plus or minus", "−": "minus",
}  # fmt: skip
VULGAR = {c: unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
POWERS = {"²": " squared", "³": " cubed", "2": " squared", "3": " cubed"}

# ------------------------------------------------------------------------------------- rules

ADDRESSES, RULES = [], []  # applied in this order; markdown's signs are removed in between
DIGITS = "0123456789"


def rule(pattern, needs="", flags=0, rules=RULES):
    """Decorate a function that replaces each match of the pattern; if it returns None, the match stays.

    needs: each match has one of these characters, so texts without any are not searched.
    """

    def add(function):
        rules.append((pattern, flags, frozenset(needs), lambda m: capitalized(m, function(m))))
        return function

    return add


compiled = cache(re.compile)  # compile at first use, so that the import is fast


def apply(rules, text):
    found = set(text)
    for pattern, flags, needs, function in rules:
        if not needs or needs & found:
            new = compiled(pattern, flags).sub(function, text)
            if new != text:
                text, found = new, set(new)
    return text


SHORTENED = re.compile(r"(?<![\w.])([A-Za-z]{1,6})\.\Z")
# Abbreviations that end no sentence before a number
NEVER_LAST = "vs v cf approx incl excl eg ie ca viz ft lb lbs oz hr hrs min mins st pkg acct ref b d".split()


def capitalized(m, said):
    """The replacement for the match m: `said`, with a capital at the start of a sentence; m itself if said is None."""
    if said is None:
        return m[0]
    if not said[:1].islower() or m[0][:1].islower():
        return said
    near = before(m, 4).rstrip("\"'“‘([ ")
    begins = m.start() < 5 if not near else near[-1] in ".!?\n" and not near.endswith("..")
    near = before(m, 12).rstrip("\"'“‘([ ")
    if near and m[0] in ("@", "&"):
        begins = False
    if begins and re.search(r"(?<!\w)(?:[A-Z]\.){2,4}$", near):  # H.R. 1319
        begins = False
    elif begins and (word := SHORTENED.search(near)) and word[1].lower() in NEVER_LAST:
        begins = False
    return said[0].upper() + said[1:] if begins else said


def before(m, n=1):
    """The n characters before a match, fewer at the start of the text. A longer slice would take quadratic time."""
    return m.string[max(m.start() - n, 0) : m.start()]


def after(m, n=1):
    return m.string[m.end() : m.end() + n]


def words_of(table):
    """A pattern that matches a table's keys, the longest first."""
    return "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True))


GOES_ON = re.compile(
    r"\s+(?:[ECMP][SD]?T|AES?T|GMT|UTC|BST|CES?T|IST|JST|KST|Eastern|Central|Mountain|Pacific|Greenwich|Zulu"
    r"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?|Jan|Feb|March|April|May|June|July|Aug|Sept|Oct|Nov|Dec)\b"
)  # after the dot of p.m.


def full_stop(m):
    """Return "." if the dot of an abbreviation at the end of `m` also ends the sentence, else ""."""
    if m[0][-2:].lower() == "m." and GOES_ON.match(after(m, 14)):
        return ""
    ends = m[0].endswith(".") and re.match(r"""["'”’)\]]*(?:\s+["'“‘(]?[A-Z]|\s*$|\n)""", after(m, 8))
    return "." if ends else ""


def sign_of(m):
    return SIGNS.get(m["sign"], "")


# Addresses


@rule(r"\b(?:mailto:)?([\w.+-]{1,64})@((?:[\w-]{1,63}\.){1,5}[A-Za-z]{2,12})\b", "@", rules=ADDRESSES)
def email(m):
    return f"{address(m[1])} at {address(m[2])}"


@rule(r"""(?:\b(?:https?|ftp)://|\bwww\.)[^\s<>"'()\[\]{}“”]+""", ":.", rules=ADDRESSES)
def url(m):
    whole = re.sub(r"^(?:\w+://)?(?:www\.)?", "", m[0])
    kept = whole.rstrip(".,;:!?*_`")
    return address(re.split(r"[?#]", kept)[0].rstrip("/")) + whole[len(kept) :].strip("*_`")


@rule(
    rf"\b(?:[\w-]{{1,63}}\.){{1,5}}(?:{'|'.join(TOP_LEVEL.split())})\b(?:/[\w./~%-]*[\w/])?(?![\w@])",
    ".",
    re.ASCII,
    ADDRESSES,
)
def domain(m):
    return address(m[0].rstrip("/"))


@rule(
    rf"(?<![\w.])[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{0,3}}\.({'|'.join(ENDINGS.split())})\b(?!\.?\w)",
    ".",
    re.ASCII,
    ADDRESSES,
)
def file_name(m):
    return address(m[0])


@rule(r"(?<!\S)(?:~|\.{1,2})?/(?=\.?\w)[\w./-]{1,300}", "/", rules=ADDRESSES)
def path(m):
    kept = m[0].rstrip("./-")
    return address(kept) + m[0][len(kept) :].replace("/", "")


def address(text):
    """example.co.uk/a-b -> example dot co dot UK slash a dash b"""
    signs = {".": "dot", "/": "slash", "-": "dash", "_": "underscore", "+": "plus", ":": "colon", "~": "tilde",
             "@": "at", "%": "percent", "=": "equals", "&": "and"}  # fmt: skip
    parts = re.findall(r"[^\W_]+|\W|_", text)
    for i, part in enumerate(parts):
        after_dot = i > 0 and parts[i - 1] == "."
        if part == "etc" and i and parts[i - 1] == "/":
            parts[i] = "E T C"
        if (
            after_dot
            and part.islower()
            and part != "co"
            and (len(part) == 2 or part == "html" or not re.search("[aeiou]", part))
        ):
            parts[i] = part.upper()
    said = " ".join(signs.get(part, part) for part in parts)
    return re.sub(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])", " ", said)


@rule(r"(?<![\w@])@(?=\w)|(?<= )@(?= )|(?<=\w)@(?=[0-9])", "@")
def at_sign(m):
    return "at" if after(m) == " " else " at " if before(m).isalnum() else "at "


# Abbreviations before a number


@rule(
    rf"(?<![\w.])(?<![0-9] (?=sec|pg?\.|c))({'|'.join(BEFORE_NUMBERS)})\.(?:[ \n](?=\(?[0-9])|(?=[0-9]))",
    DIGITS,
    re.IGNORECASE,
)
def before_number(m):
    return BEFORE_NUMBERS[m[1].lower()] + " "


@rule(r"(?<![\w.])([1-9][0-9]{0,3})ff?\.?(?=[,;)]|$)", "f")
def following(m):
    return f"{m[1]} and following"


PARTS = {"vol": "volume", "ch": "chapter", "chap": "chapter", "pt": "part", "bk": "book", "sec": "section",
         "art": "article", "sc": "scene", "no": "number", "fig": "figure", "p": "page", "pp": "pages"}  # fmt: skip


@rule(
    rf"(?<![\w.])(?:({'|'.join(PARTS)})\.|(act|book|chapter|page|pages|part|scene|section|volume)) "
    rf"(?=[ivxlIVXL]{{2}}|[vxVX]\b|i{TO}[ivxl])([ivxl]{{1,8}}|[IVXL]{{1,8}})(?:{TO}([ivxl]{{1,8}}))?(?!\w)",
    "ivxlIVXL",
    re.IGNORECASE,
)
def numeral(m):
    numbers = [roman(n.upper()) for n in (m[3], m[4]) if n]
    if not (m[3].isupper() or m[3].islower()) or not re.fullmatch(ROMAN, m[3].upper()):
        return None
    return f"{PARTS[m[1].lower()] if m[1] else m[2]} {' to '.join(map(cardinal, numbers))}"


@rule(r"(?<![\w.])(b|d|r)\. ?(?=(?:c\.|ca\.)? ?1[0-9]{3}|(?:c\.|ca\.)? ?20[0-9]{2})", ".")
def of_a_life(m):
    return {"b": "born ", "d": "died ", "r": "reigned "}[m[1]]


@rule(rf"(?<![\w./])(?<![0-9] (?=min))(?:{words_of(SHORT)})(?!\w)|(?<![\w./])w/(?=\w)", "./", re.IGNORECASE)
def short(m):
    said = SHORT[m[0].lower()]
    if said == "with":
        return said if after(m) == " " else f"{said} "
    return said + (full_stop(m) if m[0].lower() in ("etc.", "et al.", "dept.", "appt.", "govt.") else "")


@rule(rf"(?<![\w./-])({'|'.join(BARE)})(?![\w./-])")
def bare(m):
    return BARE[m[1]]


@rule(r"(?<=[\w.)] )v\. (?=[A-Z])", ".")
def against(m):
    return "versus "


# Dates and times


@rule(r"(?<![\w.])0[xX]([0-9A-Fa-f]{1,32})(?!\w)", "xX")
def hexadecimal(m):
    return f"zero x {spelled(m[1])}"


@rule(
    r"(?<![\w.-])(?=[0-9a-f]{0,40}[0-9])(?=[0-9a-f]{0,40}[a-f])[0-9a-f]{7,64}(?:-[0-9a-f]{4,12}){0,4}(?![\w-])", DIGITS
)
def hashed(m):
    if re.search("[a-f][0-9]+[a-f]|[0-9][a-f]+[0-9]", m[0]):
        return ", ".join(spelled(group) for group in m[0].split("-"))


@rule(r"(?<![\w.,-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?::([0-9]{1,5})|/([0-9]{1,2}))?(?![\w-]|\.[0-9])", ".")
def internet_address(m):
    groups = re.split("[:/]", m[0])[0].split(".")
    if (m[1] or m[2] or any(len(group) == 3 for group in groups)) and all(int(group) < 256 for group in groups):
        more = f" colon {digits(m[1])}" if m[1] else f" slash {cardinal(int(m[2]))}" if m[2] else ""
        return " dot ".join(cardinal(int(group)) for group in groups) + more


@rule(rf"(?<![\w.#])({NUMBER})[eE]([+−-]?)([0-9]{{1,3}})(?![\w.-])", "eE")
def scientific(m):
    minus = "minus " if m[2] in ("-", "−") and m[2] else ""
    return f"{number(m[1])} times ten to the power of {minus}{cardinal(int(m[3]))}"


@rule(r"(?<![\w.,])[0-9]{1,2}(?:,[0-9]{2}){1,4},[0-9]{3}(?![\w,])", ",")
def indian_groups(m):
    return f"{int(m[0].replace(',', '')):,}"


@rule(
    r"(?<![\w.,/+-])(?<![0-9] )[1-9][0-9]{0,1}(?: [0-9]{3}){2,4}(?![\w-]| [0-9])"
    r"|(?<![\w.,/+-])(?<![0-9] )[1-9][0-9]{0,2} 000(?![\w-]| [0-9])|(?<![\w.,])[0-9]{1,3}(?:\.[0-9]{3}){2,4}(?![\w.,])"
    r"|(?<![\w.,'’])[1-9][0-9]{0,2}(?:['’][0-9]{3}){1,4}(?![\w,'’])",
    DIGITS,
)
def spaced_groups(m):
    return re.sub("[ .'’]", ",", m[0])


@rule(
    rf"(?<![\w.,])([0-9]{{1,4}}),([0-9]{{1,2}})(?= ?(?:[€£$¥%‰]|°|(?:{words_of(UNITS)}|EUR)\b)(?!\w))"
    rf"|(?<=[€£$¥])([0-9]{{1,4}}),([0-9]{{2}})(?![\w,]|\.[0-9])",
    ",",
)
def comma_decimals(m):
    return f"{m[1] or m[3]}.{m[2] or m[4]}"


@rule(r"(?<![\w.])([0-9]{1,15}(?:,[0-9]{3}){0,5})?(\.)?([0-9]{16,})", DIGITS)
def endless(m):
    whole = number(m[1]) if m[1] and m[2] else digits(m[1] or "")
    return f"{whole}{' point' if m[2] else ''} {digits(m[3])}".strip()


@rule(r"(?<![\w.,])([0-9]{1,3}(?:\.[0-9]{3}){1,5}),([0-9]{2})(?![\w.,])", ",")
def comma_for_a_point(m):
    return f"{m[1].replace('.', ',')}.{m[2]}"


@rule(
    r"(?<![\w/-])([0-9]{4})([-/])([0-9]{2})\2([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::[0-9]{2}(?:\.[0-9]{1,9})?)?Z?)?(?![\w/-])",
    DIGITS,
)
def iso_date(m):
    if said := date(int(m[1]), int(m[3]), int(m[4])):
        return said + (f", {clock(m[5], m[6])}" if m[5] and int(m[5]) < 25 and int(m[6]) < 60 else "")


def date(y, month, day):
    if 1 <= month <= 12 and 1 <= day <= 31:
        return f"{MONTHS[month - 1]} {ordinal(day)}, {year(y)}"


@rule(r"(?<![\w/.-])([0-9]{1,2})([/.-])([0-9]{1,2})\2((?:1[89]|20)[0-9]{2}|[0-9]{2})(?![\w/-]|\.[0-9])", DIGITS)
def numeric_date(m):
    first, second, y = int(m[1]), int(m[3]), int(m[4])
    if len(m[4]) == 2:
        if m[2] in ".-":  # a version, a score
            return None
        y += 2000 if y < 70 else 1900
    american = m[2] in "/-" and first <= 12
    return date(y, *(first, second) if american else (second, first))


DAY = r"(Mon|Tues?|Weds?|Thu(?:rs?)?|Fri|Sat|Sun)\b\.?"
THEN = (
    r"(?=:|(?<=\.)[,;)]|(?<!Sun\.)(?<!Sat\.)(?<=\.)(?: [a-z]|\s+[A-Z]|\s*$)| (?:night|morning|evening|afternoon)\b"
    rf"|,? (?:{MONTH}|[0-9]{{1,2}}(?:[:.–/-][0-9]|{NTH}?[ \n](?:of )?{MONTH}| ?[ap]\.?m)))"
)


@rule(rf"(?<![\w.]){DAY}(?:{TO}{DAY}|{THEN})", "MTWFS")
def weekday(m):
    first, second = (next((day for day in DAYS if name and day.startswith(name[:3])), None) for name in (m[1], m[2]))
    stop = "" if not m[0].endswith(".") or re.match(rf" (?:{MONTH}|[0-9])", after(m, 12)) else full_stop(m)
    return f"{first} to {second}{stop}" if second else first + stop


@rule(
    rf"\b{MONTH}\.?[ \n]([0-9]{{1,2}}){NTH}?(?:{TO}([0-9]{{1,2}}){NTH}?)?(?:(,?)[ \n]{YEAR})?(?![\w%:/]|[.,][0-9])",
    DIGITS,
)
def month_day(m):
    if not (1 <= int(m[2]) <= 31 and int(m[3] or 1) <= 31):
        return None
    until = f" to {ordinal(int(m[3]))}" if m[3] else ""
    return f"{month(m[1])} {ordinal(int(m[2]))}{until}" + (f", {year(int(m[5]))}" if m[5] else "")


@rule(
    rf"(?<![\w.,:/$£€-])([0-9]{{1,2}}){NTH}?(?:{TO}([0-9]{{1,2}}){NTH}?)?[ \n](?:of[ \n])?{MONTH}\.?"
    rf"(?:,?[ \n]{YEAR})?(?!\w)",
    DIGITS,
)
def day_month(m):
    if not (1 <= int(m[1]) <= 31 and int(m[2] or 1) <= 31):
        return None
    the = "" if before(m, 4).lower() == "the " else "the "
    until = f" to {ordinal(int(m[2]))}" if m[2] else ""
    more = f", {year(int(m[4]))}" if m[4] else "." * m[0].endswith(".") if m[3] in MONTHS else full_stop(m)
    return f"{the}{ordinal(int(m[1]))}{until} of {month(m[3])}{more}"


@rule(
    r"(?<![\w.,-])([1-9][0-9]{2,3})(?= (?:AD|CE|BCE?|A\.D\.|B\.C\.|C\.E\.)(?!\w))|(?<=\bAD )([1-9][0-9]{2})\b", DIGITS
)
def year_of_an_era(m):
    n = int(m[1] or m[2])
    return in_pairs(n) if n % 100 > 9 else None


@rule(r"(?<=\b[Ii]n )(10[1-9][0-9])(?=[,.;:)]|$| [A-Z]| (?:the|he|she|they|it|a|when|and)\b)", DIGITS)
def year_of_the_eleventh_century(m):
    return in_pairs(int(m[1]))


@rule(rf"\b{MONTH}\.?,?[ \n](?:{YEAR}|['’]([0-9]{{2}})(?![\w'’]))", DIGITS)
def month_year(m):
    return f"{month(m[1])} {year(int(m[2])) if m[2] else in_the_century(m[3])}"


def in_the_century(two):
    """'24 -> twenty-four; '05 -> oh five"""
    return f"oh {cardinal(int(two))}" if two[0] == "0" else cardinal(int(two))


@rule(r"(?<=\b[QH][1-4])['’]([0-9]{2})\b", "QH")
def of_a_year(m):
    return f" {in_the_century(m[1])}"


BOOKS = """
Genesis Exodus Leviticus Deuteronomy Joshua Judges Ruth Samuel Kings Chronicles Ezra Nehemiah Esther Psalms? Proverbs
Ecclesiastes Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah
Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans Corinthians Galatians Ephesians Philippians Colossians
Thessalonians Timothy Titus Philemon Hebrews James Peter Jude Revelation Surah? Quran Qur'an Koran
""".split()
MEN = "Col Dan Ex Gal Jas Josh Mal Mic Mt Num Pet Phil Sam Tim".split()  # which are not only short for books
SHORT_BOOKS = {
    "Gen": "Genesis", "Ex": "Exodus", "Exod": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deut": "Deuteronomy",
    "Josh": "Joshua", "Judg": "Judges", "Sam": "Samuel", "Chron": "Chronicles", "Ps": "Psalm", "Pss": "Psalms",
    "Prov": "Proverbs", "Eccl": "Ecclesiastes", "Isa": "Isaiah", "Jer": "Jeremiah", "Ezek": "Ezekiel", "Dan": "Daniel",
    "Hos": "Hosea", "Mic": "Micah", "Zech": "Zechariah", "Mal": "Malachi", "Matt": "Matthew", "Mt": "Matthew",
    "Mk": "Mark", "Lk": "Luke", "Jn": "John", "Rom": "Romans", "Cor": "Corinthians", "Gal": "Galatians",
    "Eph": "Ephesians", "Phil": "Philippians", "Col": "Colossians", "Thess": "Thessalonians", "Tim": "Timothy",
    "Heb": "Hebrews", "Jas": "James", "Pet": "Peter", "Rev": "Revelation",
}  # fmt: skip


@rule(
    rf"(?:\b([1-3]|I{{1,3}}|1st|2nd|3rd) )?\b(?:({'|'.join(BOOKS)})|({'|'.join(SHORT_BOOKS)})(\.?)) "
    rf"([0-9]{{1,3}}):([1-9][0-9]{{0,2}})(?:{TO}([0-9]{{1,3}})(?!:)|, ?([0-9]{{1,3}})(?![\w:,]))?"
    r"(?!\w| ?[AaPp]\.?[Mm]\b)",
    ":",
)
def verse(m):
    which, book, short_book, dot, chapter, verse, last, other = m.groups()
    if short_book in MEN and not (dot or which):  # Tim 5:30
        return None
    until = f" to {cardinal(int(last))}" if last else f" and {cardinal(int(other))}" if other else ""
    which = f"{ordinal('123'.find(which[0]) + 1 or len(which))} " if which else ""
    gap = " " if int(chapter) < 20 and int(verse) > 9 else ", "
    return f"{which}{book or SHORT_BOOKS[short_book]} {cardinal(int(chapter))}{gap}{cardinal(int(verse))}{until}"


def month(name):
    return next(m for m in MONTHS if m.startswith(name[:3]))


@rule(r"\b(24/7|9/11|50[/-]50|20/20)(?![\w/])", DIGITS)
def fixed_pairs(m):
    first, second = re.split("[/-]", m[1])
    return f"{cardinal(int(first))} {cardinal(int(second))}"


@rule(
    rf"\b(on|by|since|until|before|after|from|due|dated?|(?:{'|'.join(DAYS)}),?) ([0-9]{{1,2}})/([0-9]{{1,2}})"
    r"(?![\w/]|[.,][0-9])",
    "/",
)
def short_date(m):
    first, second = int(m[2]), int(m[3])
    if first <= 12 and second <= 31 and first and second:
        return f"{m[1]} {MONTHS[first - 1]} {ordinal(second)}"


@rule(r"(?:(?<=[AaPp][Mm])|(?<=[AaPp]\.[Mm]\.)) ?((?:[ECMP][SD]?T)?)/(?=[0-9]{1,2})", "/")
def other_time_zone(m):
    return f" {m[1]}, " if m[1] else ", "


CLOCK = rf"([0-9]{{1,2}})(?:[:.]([0-5][0-9]))?(?: ?{HALF_DAY})?"


@rule(rf"(?<![\w:.,$£€-]){CLOCK}(?:{TO}| to | until ){CLOCK}(?![\w:%]|[.,][0-9])", DIGITS)
def time_range(m):
    if not any((m[3], m[7])) and ":" not in m[0]:
        return None
    if int(m[1]) > 24 or int(m[5]) > 24:
        return None
    return f"{clock(m[1], m[2], m[3] or (m[7] and ''))} to {clock(m[5], m[6], m[7])}{full_stop(m) if m[8] else ''}"


@rule(r"(?<![\w:.,$£€-])([0-9]{1,2}):([0-5][0-9])([ap])\b", ":")
def short_time(m):
    return clock(m[1], m[2], m[3]) if int(m[1]) < 13 else None


@rule(r"(?<![\w:.,$£€-])([0-9]{1,2}):([0-5][0-9])(\.[0-9]{1,3})(?![\w:]|[.,][0-9])", ":")
def lap_time(m):
    seconds = f"oh {cardinal(int(m[2]))}" if m[2][0] == "0" else cardinal(int(m[2]))
    return f"{cardinal(int(m[1]))} {seconds} {number(m[3])}"


@rule(rf"(?<![\w:.,$£€-])([0-9]{{1,2}}):([0-5][0-9])(?::([0-5][0-9]))?(?: ?{HALF_DAY})?(?![\w:]|[.,][0-9])", ":")
def time(m):
    if int(m[1]) > 24:
        return None
    seconds = f" and {cardinal(int(m[3]))} seconds" if m[3] else ""
    if seconds and not int(m[2]):
        return f"{cardinal(int(m[1]))} hours{seconds}"
    return clock(m[1], m[2], m[4], bool(seconds)) + seconds + full_stop(m)


@rule(rf"(?<![\w:.,$£€-])([0-9]{{1,2}})(?:\.([0-5][0-9]))? ?{HALF_DAY}", DIGITS)
def hour(m):
    if int(m[1]) <= 12:
        return clock(m[1], m[2], m[3]) + full_stop(m)


def clock(hours, minutes, half=None, seconds=False):
    """A time of day in words. half: "a" or "p", "" if it is said elsewhere, None on a 24-hour clock."""
    h, m = int(hours), int(minutes or 0)
    letters = f" {half.upper()} M" if half else ""
    if m:
        return f"{cardinal(h)} {'oh ' if m < 10 else ''}{cardinal(m)}{letters}"
    if half is not None or seconds or not minutes:
        return cardinal(h) + letters
    return f"{cardinal(h)} o'clock" if 0 < h <= 12 else f"{cardinal(h)} hundred" if h else "midnight"


@rule(r"(?<![\w.])([0-9]{1,3}) ?h(?:rs?)? ?([0-9]{1,2})(?: ?m(?:in)?s?(?: ?([0-9]{1,2}) ?s(?:ec)?)?)?\b", DIGITS)
def duration(m):
    parts = [f"{cardinal(int(n))} {plural(name) if int(n) != 1 else name}"
             for n, name in zip(m.groups(), ("hour", "minute", "second")) if n]  # fmt: skip
    return " ".join(parts)


@rule(r"(?<![\w.,])(?:([$£€])?(1,?000|10,000|100,000)['’]?s\b|([$£€])?(100?)['’]?s(?= of )|([$£€])(100)s\b)", DIGITS)
def hundreds(m):
    many = {"10": "tens", "100": "hundreds", "1000": "thousands", "10000": "tens of thousands",
            "100000": "hundreds of thousands"}[(m[2] or m[4] or m[6]).replace(",", "")]  # fmt: skip
    symbol = m[1] or m[3] or m[5]
    return f"{many} of {CURRENCIES[symbol][1]}" if symbol else many


@rule(
    r"(?<![\w.,$£€])(?:(1[0-9]|20)|['’]|(?<=the )|(?<=his )|(?<=her )|(?<=their )|(?<=my )|(?<=your )|(?<=mid[ -])"
    r"|(?<=early )|(?<=late )|(?<=low[ -])|(?<=high[ -])|(?<=lower )|(?<=upper )"
    r"|(?<=under[ -])|(?<=over[ -])|(?<=0s and )|(?<=0s or )|(?<=0s[-–]))([0-9])0['’]?s\b",
    DIGITS,
)
def decade(m):
    century, tens = int(m[1] or 0), int(m[2])
    if tens > 1 or (century and tens == 1):
        return f"{cardinal(century) if century else ''} {plural(TENS[tens]) if tens > 1 else 'tens'}".strip()
    if century and tens == 0:
        return f"{cardinal(century // 10)} thousands" if century % 10 == 0 else f"{cardinal(century)} hundreds"


# Money, percent, units


@rule(r"(?<![\w<>=)\]-])([<>≤≥]=?) ?(?=[-−]?[$£€¥]?\.?[0-9])", "<>≤≥")
def bound(m):
    gap = " " if before(m) == "," else ""
    if m[0][-1] == " " and re.fullmatch(r"[\w)\]] ", before(m, 2)):  # x < 5
        return None
    return gap + {"<": "less than ", ">": "more than ", "≤": "at most ", "≥": "at least ", "<=": "at most ",
            ">=": "at least "}[m[1]]  # fmt: skip


@rule(
    r"(?<![\w.])([0-9]{1,3}(?:\.[0-9]{1,8})?) ?°"
    r"(?: ?([0-9]{1,2})[′'’](?: ?([0-9]{1,2}(?:\.[0-9]{1,4})?)(?:[″\"”]|''))?)? ?([NSEW]\b)?",
    "°",
)
def angle(m):
    degrees, minutes, seconds, side = m.groups()
    if not (minutes or side):
        return f"{number(degrees)} degree" if re.match(" (?:angle|arc|bend|corner|turn|view)", after(m, 7)) else None
    parts = [f"{number(degrees)} degree{'s' * (degrees != '1')}"]
    parts += [f"{number(n)} {name}{'s' * (n != '1')}" for n, name in ((minutes, "minute"), (seconds, "second")) if n]
    compass = {"N": "north", "S": "south", "E": "east", "W": "west"}
    return " ".join([*parts, *([compass[side]] if side else [])])


@rule(r"(?<![\w.,/'’′-])([0-9]{1,3}(?:\.[0-9]{1,2})?)[\"″] ?[x×] ?(?=[0-9])", "x×")
def inches_by(m):
    return f"{number(m[1])} inches by "


@rule(r"(?<=inches by )([0-9]{1,3}(?:\.[0-9]{1,2})?)[\"″]", '"″')
def last_inches(m):
    return f"{number(m[1])} inches"


@rule(
    r"(?<![\w.,/'’′-])([0-9]{1,3}(?:\.[0-9]{1,2})?|(?:[0-9]{1,2}[ -])?[0-9]{1,2}/[0-9]{1,2})"
    r"[\"″] ?(?=[a-z])(?!x ?[0-9])",
    '"″',
)
def inches(m):
    if m[0].rstrip()[-1] == '"' and re.search(r'(?:^|[\s(])"[^"]*$', before(m, 200)):  # it ends a quotation
        return None
    name = "inch"
    if re.match(r"(?:a(?:part|cross|nd|bove)|by|deep|from|high|i[ns]|long|o[fnr]|tall|thick|to|wide)\b", after(m, 7)):
        name = "inches" if m[1] != "1" else name
    elif "/" not in m[1]:
        return f"{m[1]}-inch "
    return f"{number(m[1]) if '/' not in m[1] else apply_fraction(m[1])} {name} "


def apply_fraction(text):
    """1 3/4 -> one and three quarters"""
    *whole, over, under = map(int, re.findall("[0-9]+", text))
    if not 0 < over < under:
        return text
    return f"{cardinal(whole[0])} and {fraction_behind(over, under)}" if whole else fraction(over, under)


@rule(
    rf"(?<![\w.])({NUMBER} ?(?:° ?[CF]|{words_of(UNITS | FIXED)}))/"
    r"(?=[0-9]{1,6}(?:\.[0-9]{1,3})? ?([A-Za-z°]{1,3}))",
    "/",
)
def same_in_other_units(m):
    doses = "mg", "mcg", "µg", "ng"
    return f"{m[1]} per " if m[1].endswith(doses) and m[2] in ("g", "ml", "mL", "L", "kg") else f"{m[1]}, "


@rule(
    rf"(?<=[0-9] )([a-z]{{4,15}})/({EACH}|k?m[²2])(?![\w/])"
    rf"|(?<![\w.,/$£€¥₹–-])([0-9]{{1,4}}) ?([x×]?)/({EACH})(?![\w/])",
    "/",
)
def so_many_per(m):
    if m[1]:
        return f"{m[1]} per {UNITS.get(m[2], m[2])}" if m[1] not in EACH.split("|") else None
    name = UNITS.get(m[5], m[5])
    an = "an" if name == "hour" else "a"
    return f"{number(m[3])} times {an} {name}" if m[4] else f"{number(m[3])} per {name}"


@rule(r"(?<=[0-9])( ?[A-Za-z°%]{1,4}) ?– ?(?=[0-9])|(?<=[AP] M) ?[–-] ?(?=\w)", "–-")
def until(m):
    return f"{m[1] or ''} to "


@rule(r"\b(480|720|1080|1440|2160|4320)([pi])\b", "pi")
def lines_of_a_picture(m):
    high, low = divmod(int(m[1]), 100)
    return f"{cardinal(high)} {cardinal(low)} {m[2]}"


@rule(
    rf"(?<![\w.])([0-9]{{1,4}}(?:\.[0-9]{{1,3}})?)( ?(?:cm|mm|m|ft|in|px))? ?[x×] ?"
    rf"(?={NUMBER} ?(?:(cm|mm|m|km|ft|in|px)\b|(?:{words_of(set(UNITS) - {'s'})})\b))",
    "x×",
)
def so_many(m):
    name = f" {plural(UNITS[m[2].strip()])}".replace("foots", "feet") if m[2] and m[2].strip() in UNITS else ""
    return f"{number(m[1])}{name} {'by' if m[3] or m[2] else 'times'} "


@rule(rf"([$£€¥]) ?\(({NUMBER})\)", "$£€¥")
def loss(m):
    return f"-{m[1]}{m[2]}"


MONEY = rf"({AMOUNT})(?:(?:[ -](?=[tmblc][a-z]{{3,7}}|[mbt]n\b))?({LARGE_})\b)?"


@rule(
    rf"{SIGN}(?:(?<!\w)(US|AU?|CA?|NZ|HK|S))?([$£€¥₹₩₽₿₺₪₦₱฿₫₴]|(?<![\w$])Rs\.?) ?{MONEY}(?:{TO}[$£€¥₹]?{MONEY})?"
    rf"(?!\w|[.,][0-9]){PER}",
    DIGITS,
)
def money(m):
    country, symbol, first, large, second, larger, per = m.groups()[1:]
    symbol = "₹" if symbol.startswith("Rs") else symbol
    large = LARGE.get(large, "")
    larger = LARGE.get(larger, "")
    country = COUNTRIES.get(country, "")
    if second:
        if "." in first + second and not larger:
            said = f"{amount(first, large, symbol, country)} to {amount(second, larger, symbol, country)}"
        else:
            said = f"{number(first)} {large}".strip() + f" to {number(second)} {larger}".rstrip()
            said = f"{said} {country}{CURRENCIES[symbol][1]}"
    else:
        said = amount(first, large, symbol, country, not per and is_adjective(m))
    return sign_of(m) + said + per_words(per)


NO_NOUN = """
a above after an and are as at be because before below between beyond but by can could did do does each for from had
has have he her his i if in into is it less may might more must no not of off on only or our over owed paid per plus
she should so than that the their then there they this to under until up was we were when where which while who will
with would you your
""".split()


def is_adjective(m):
    """Whether a noun follows that the amount describes: a $5 bill, a 10 km run, a $3-a-day job."""
    if re.match("-[A-Za-z]| (?:bill|coin|note)s?\\b", after(m, 7)):
        return True
    word = re.search(r"(?<![\w’'])([A-Za-z]{1,7}) $", before(m, 9))
    if not word or word[1].lower() not in "a an another by every the this that its his her their our my".split():
        return False
    noun = re.match(" ([a-z]{2,20})\\b", after(m, 22))
    return bool(noun) and noun[1] not in NO_NOUN


def amount(text, large, symbol, country="", adjective=False):
    one, many, cent, cents = CURRENCIES[symbol]
    many, cents = (one, cent) if adjective else (many, cents)
    whole, _, hundredths = text.replace(",", "").partition(".")
    if large or len(hundredths) not in (0, 2) or (hundredths and not cents):
        return f"{number(text)} {large}".strip() + f" {country}{many}"
    n, parts = int(hundredths or 0), []
    if int(whole or 0) or not n:
        parts.append(f"{cardinal(int(whole or 0))} {country}{one if int(whole or 0) == 1 else many}")
    if n:
        parts.append(f"{cardinal(n)} {cent if n == 1 else cents}")
    return " and ".join(parts)


def per_words(per):
    return f" per {UNITS.get(per, per)}" if per else ""


@rule(rf"{SIGN}{MONEY} ?([€£¥₹₽₿¢$])(?![\w{{(]){PER}", "€£¥₹₽₿¢$")
def money_behind(m):
    return sign_of(m) + amount(m[2], LARGE.get(m[3], ""), m[4]) + per_words(m[5])


@rule(rf"(?<!/)\b(?:({'|'.join(CODES)}) ?{MONEY}|(?<![\w.]){MONEY} ?({'|'.join(CODES)}))\b", DIGITS)
def money_code(m):
    before, first, large, second, larger, behind = m.groups()
    return " ".join(filter(None, (number(first or second), LARGE.get(large or larger), CODES[before or behind])))


@rule(rf"{SIGN}({AMOUNT}) ?%?(?:{TO}({NUMBER}))? ?(%|‰)", "%‰")
def percent(m):
    until = f" to {number(m[3])}" if m[3] else ""
    gap = " " if after(m).isalnum() else ""
    return f"{sign_of(m)}{number(m[2])}{until} {'percent' if m[4] == '%' else 'per mille'}{gap}"


@rule(r"(?<![\w.])([0-9])['’′] ?([0-9]{1,2})(?:[\"”″]|''|(?= |\n|$|[.,;!?]))", "'’′")
def feet_and_inches(m):
    return f"{cardinal(int(m[1]))} foot {cardinal(int(m[2]))}"


@rule(rf"(?<![\w./])([0-9]{{1,2}})/([0-9]{{1,2}})[ -]?({words_of(UNITS)}|{'|'.join(COUNTED)})(\.?)(?!\w)", "/")
def part_of_unit(m):
    over, under, name = int(m[1]), int(m[2]), UNITS.get(m[3], m[3])
    if not 1 <= over < under or under > 20 or before(m, 2).strip().isdigit():
        return None
    an = "an" if name[0] in "aeio" or name == "hour" else "a"
    said = f"half {an} {name}" if (over, under) == (1, 2) else f"{fraction(over, under)} of {an} {name}"
    return said + full_stop(m)


PLACES = re.compile(r"(?i)\b(?:apartment|apt|bus|figure|flat|gate|line|page|platform|room|row|seat|table|unit)s? $")


@rule(rf"{SIGN}({NUMBER})(?:{TO}({NUMBER}))?(?: ?° ?([CF])\b|([CF])(?![\w+#-]))", "CF")
def temperature(m):
    if m[5] and (len(m[2]) < 2 or PLACES.search(before(m, 12))):
        return None
    until = f" to {number(m[3])}" if m[3] else ""
    degrees = "degree" if m[2] == "1" and not until else "degrees"
    return f"{sign_of(m)}{number(m[2])}{until} {degrees} {TEMPERATURES[m[4] or m[5]]}"


@rule(
    rf"{SIGN}({AMOUNT})(?: ([0-9])/([0-9]{{1,2}}))?(?:{TO}({NUMBER}))?([ -]?)({words_of(UNITS | FIXED)})"
    rf"(\.(?!\w))?(?![\w²³]){PER}",
    DIGITS,
)
def unit(m):
    first, over, under, second, gap, name, dot, per = m.groups()[1:]
    if name == "s" and gap:
        return None
    if name == "s" and re.fullmatch(r"[A-Za-z]-", before(m, 2)):  # B-52s
        return plural(number(first))
    if over and not 1 <= int(over) < int(under):
        return None
    single = first == "1" and not second and not over
    said = number(first) + (f" and {fraction_behind(int(over), int(under))}" if over else "")
    said += f" to {number(second)}" if second else ""
    if name in FIXED:
        return f"{sign_of(m)}{said} {FIXED[name]}{per_words(per)}{full_stop(m)}"
    word = UNITS[name]
    if not single and gap != "-" and (per or second or not is_adjective(m)):
        *front, last = word.split()
        word = " ".join([*front, "feet" if last == "foot" else last if last.endswith("hertz") else plural(last)])
    return f"{sign_of(m)}{said} {word}{per_words(per)}{full_stop(m) if dot or name.endswith('.') else ''}"


def fraction_behind(over, under):
    """two and a half"""
    said = fraction(over, under)
    return f"a {said.removeprefix('one ')}" if over == 1 and under != 8 else said


# Fractions, telephones, versions, ordinals


@rule(rf"(?<![\w./,])([0-9]{{1,2}})/([0-9]{{1,3}}){NTH}(s?)(?!\w)", "/")
def ordinal_fraction(m):
    return f"{cardinal(int(m[1]))} {ordinal(int(m[2]))}{m[3]}"


@rule(r"(?<![\w./,])([0-9]{1,2})/([0-9]{1,2})(?=[ -](?:time|beat|metre|meter|signature|measure)s?\b)", "/")
def time_signature(m):
    return f"{cardinal(int(m[1]))} {cardinal(int(m[2]))}"


@rule(r"(?<![\w./,])1/(1000|10000|1,000|10,000)(?![\w/]|[.,][0-9])", "/")
def one_of_many(m):
    return f"one out of {number(m[1])}"


@rule(r"(?<![\w./,])(?:([0-9]{1,4})[ -])?([0-9]{1,3}(?:\.[0-9]{1,2})?)/([0-9]{1,3})(?![\w/]|[.,][0-9])", "/")
def fractions(m):
    if "." in m[2]:
        return f"{m[1] + ' ' if m[1] else ''}{number(m[2])} out of {cardinal(int(m[3]))}"
    over, under = int(m[2]), int(m[3])
    if over + under == 100 and over > 9 and under > 9 and not m[1]:  # an 80/20 rule
        return f"{cardinal(over)} {cardinal(under)}"
    if m[1] and 1 <= over < under <= 16:
        return f"{cardinal(int(m[1]))} and {fraction_behind(over, under)}"
    whole = m[0][: m.start(2) - m.start()]
    if 1 <= over < under and under in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16):
        return whole + fraction(over, under)
    return whole + f"{cardinal(over)} {'out of' if over <= under else 'over'} {cardinal(under)}"


@rule(
    r"(?<![\w.])((?:\+[0-9]{1,3}|1)[ .-])?(?:\(([0-9]{3})\) ?|([0-9]{3})[-. ])([0-9]{3})[-. ]([0-9]{4})"
    r"(?![\w-]|\.[0-9])"
    r"|(?<![\w.,$£€-])([0-9]{3})-([0-9]{4})(?![\w-]|\.[0-9])",
    DIGITS,
)
def telephone(m):
    country, *groups = m.groups()
    plus = "plus " if country and country[0] == "+" else ""
    return plus + ", ".join(digits(group) for group in (country, *groups) if group)


@rule(
    r"(?<![\w.])\+(?:[0-9]{7,15}|[0-9]{1,3}(?:[ .-](?:\(0\) ?)?\(?[0-9]{1,7}\)?){2,6})(?![\w-])"
    r"|\b0[0-9]{2,4}(?:[ -][0-9]{3,4}){1,3}(?![\w-])|\b0[0-9]{4}[ -][0-9]{6}(?![\w-])"
    r"|\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b|\b[0-9]{4}(?:[ -][0-9]{4}){3}\b|\b[0-9]{1,12}(?:-[0-9]{1,12}){3,6}\b",
    DIGITS,
)
def many_groups(m):
    groups = ", ".join(digits(group) for group in re.findall(r"[0-9]+", m[0].replace("(0)", "")))
    return f"plus {groups}" if m[0][0] == "+" else groups


@rule(r"(?<![\w.-])1-([89][0-9]{2})-(?=[0-9-]{0,12}[A-Z])([A-Z0-9-]{4,12})(?![\w-])", DIGITS)
def vanity_number(m):
    name = " ".join(digits(part) if part[0].isdigit() else part for part in re.findall("[0-9]+|[A-Z]+", m[2]))
    return f"one, {'eight hundred' if m[1] == '800' else digits(m[1])}, {name}"


@rule(r"\b([A-Z]{2}) ([0-9]{5})(?:-([0-9]{4}))?(?![\w-])", DIGITS)
def postal_code(m):
    return f"{m[1]} {digits(m[2])}" + (f", {digits(m[3])}" if m[3] else "")


@rule(
    r"\b((?:call|dial|text) (?=[0-9]{3}\b)|(?:code|PIN|OTP|passcode)(?: is)?:? )([0-9]{3,8})\b(?![-.,/%:][0-9])",
    DIGITS,
    re.IGNORECASE,
)
def short_number(m):
    return f"{m[1]}{digits(m[2])}"


@rule(
    r"(?<![\w.])(?:(v|V)|ver\. ?)?([0-9]{1,5}(?:\.[0-9]{1,5}){2,4})(?=(?:[a-z]{1,5}[0-9]{0,3})?(?:\W|$))(?!\.[0-9])",
    DIGITS,
)
def version(m):
    letter = "version " if m[1] and before(m, 8).lower() != "version " else ""
    return letter + " point ".join(cardinal(int(n)) for n in m[2].split("."))


@rule(
    rf"(?:(?<![\w.])v(?=[0-9])|\b((?:{'|'.join(VERSIONED)}) ?v?))([0-9]{{1,3}}(?:\.[0-9]{{1,3}})?)(?![\w]|\.[0-9])",
    DIGITS,
)
def named_version(m):
    return (m[1].rstrip("v ") if m[1] else "version") + " " + " point ".join(cardinal(int(n)) for n in m[2].split("."))


@rule(rf"(?<![\w.,])([0-9]{{1,3}}(?:,[0-9]{{3}}){{0,4}}|[0-9]{{1,9}}){NTH}(?!\w)", DIGITS, re.IGNORECASE)
def ordinals(m):
    n = int(m[1].replace(",", ""))
    if m[0][-2:].lower() == "st" and (n % 10 != 1 or n % 100 == 11):
        return f"{cardinal(n)} stone"
    return ordinal(n)


# Roman numerals


@rule(rf"\b({'|'.join(MONARCHS)}) (?=[IVX]){ROMAN}(?!\w)(?!['’][a-rt-z])", "IVX")
def monarch(m):
    if m[2] in ("I", "V", "X") and not re.match(r"['’]s\b|[.,;:)!?]|\s*$| of\b", after(m, 6)):
        return None
    return f"{m[1]} the {ordinal(roman(m[2]))}"


@rule(
    rf"\b({'|'.join(NUMBERED_NAMES)}|{'|'.join(n.upper() for n in NUMBERED_NAMES)})\.? (?=[IVXL]){ROMAN}(?![\w'’])",
    "IVXL",
)
def numbered_name(m):
    return f"{m[1]} {cardinal(roman(m[2]))}"


@rule(rf"(?<=[a-z]) (?=[IVX]{{2}}){ROMAN}(?![\w'’])", "IVX")
def other_name(m):
    name = re.search(r"\b([A-Z][a-z]{0,28})$", before(m, 30))
    if name and name[1] not in (
        "The",
        "An",
        "And",
        "This",
        "That",
        "My",
        "In",
        "On",
        "With",
        "For",
        "To",
        "Of",
        "Use",
        "No",
    ):
        return f" {cardinal(roman(m[1]))}"


@rule(r"(?<![\w.])(?=[MDCLXVI]{4})M{1,2}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})(?![\w'’])", "M")
def roman_year(m):
    return year(roman(m[0]))


@rule(rf"(?<![\w.])(?=[IVX]){ROMAN}(?:th|st)?(?= (?:[Cc]entur(?:y|ies)|[Dd]ynasty|[Oo]lympiad)\b)", "IVX")
def roman_ordinal(m):
    return ordinal(roman(m[1]))


def roman(text):
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[c] for c in text]
    return sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))


# Abbreviations


@rule(r"(?<![\w.])(?:[A-Z]\.){2,3}(?!\w)|(?<![\w.])Ph\.D\.(?!\w)", ".")
def joined(m):
    if m[0] in JOINED:  # only at the end of a paragraph does the dot surely end a sentence
        return JOINED[m[0]] + ("." if not after(m, 9).strip("\"'”’) \n") else "")


@rule(rf"\b([0-9]{{1,6}} (?:[NSEW]\.? )?(?:[A-Z][\w'’]{{0,30}} ){{1,3}})({'|'.join(STREETS)})\b\.?(?!\w)", DIGITS)
def street_with_number(m):
    return f"{m[1]}{STREETS[m[2]]}{full_stop(m)}"


@rule(
    rf"\b([A-Z][\w'’]{{0,30}}|[0-9]{{1,3}}{NTH}) ({'|'.join(STREETS)})\b(?:\.(?! [A-Z])|(?=[,\n]|$))(?!\w)", "SABRLDCPH"
)
def street(m):
    return f"{m[1]} {STREETS[m[2]]}{full_stop(m)}"


@rule(r"\b(?<=[A-Za-z0-9] )(Ave|Blvd|Rd|Ln|Hwy|Pkwy)\.(?!\w)", ".")
def street_alone(m):
    return STREETS[m[1]] + full_stop(m)


@rule(rf"(?<![\w.])({'|'.join(TITLES)})(\.?)[ \n](?=[A-Z]|(?:and|&) (?:Mrs?|Ms|Dr)\b)", "DMPRFGCLSAH")
def title(m):
    if m[2] or m[1] in ("Dr", "Mr", "Mrs", "Ms", "Prof", "St"):
        return TITLES[m[1]] + m[0][-1]


@rule(rf"(?<=[\w,] )({'|'.join(AFTER_NAMES)})\.(?!\w)", ".")
def after_name(m):
    return AFTER_NAMES[m[1]] + full_stop(m)


# Signs between numbers and words


@rule(r"(?<=[a-z] )No (?=[0-9])|(?<!\w)(?:#|№) ?(?=[0-9])|(?<!\w)#([A-Za-z]\w{0,60})", "#№N")
def number_sign(m):
    if m[1]:
        return "hashtag " + re.sub("(?<=[a-z])(?=[A-Z])", " ", m[1])
    return "hashtag " if re.match(r"[0-9]{1,4}[A-Z][A-Za-z]", after(m, 6)) else "number "


@rule(r"\b([CFJ])(\+\+|#)(?!\w)", "+#")
def languages(m):
    return m[1] + (" plus plus" if m[2] == "++" else " sharp")


@rule(r"\b([A-D])([+−])(?=[\s,.;:!?)]|$)", "+−")
def mark(m):
    return m[1] + (" plus" if m[2] == "+" else " minus")


@rule(rf"(?<![\w.])({NUMBER})(?: ?[x×] ?({NUMBER}))(?: ?[x×] ?({NUMBER}))?(s)?(?!\w)", "x×")
def dimensions(m):
    numbers = [n for n in m.groups()[:3] if n]
    if "=" in after(m, 2) or " × " in m[0]:
        return " times ".join(map(number, numbers))
    said = " by ".join(year_or_number(n) if len(n) == 4 else number(n) for n in numbers)
    return plural(said) if m[4] else said


@rule(
    r"(?<![\w.])((?<![\w)] )[-−])?([0-9]{1,4})([xyz])"
    r"(?= ?(?:[=+*^²³]|[<>≤≥] ?[0-9]|- ?[0-9]{1,4}[ )=]|- ?[0-9]{0,3}[yz]))"
    r"|(?<=[=+] )([0-9]{1,4})([xyz])\b|(?<= minus )([0-9]{1,4})([xyz])\b",
    "xyz",
)
def algebra(m):
    n, letter = (m[i] or m[i + 2] or m[i + 4] for i in (2, 3))
    return f"{'minus ' if m[1] else ''}{number(n)} {letter}"


@rule(rf"(?<![\w.^])({NUMBER})(?:[x×]?{TO}({NUMBER}))?[x×](?!\w)", "x×")
def times(m):
    return f"{number(m[1])}{' to ' + number(m[2]) if m[2] else ''} times"


@rule(r"\b401\(?k\)?(?!\w)", DIGITS)
def pension(m):
    return "four oh one k"


@rule(rf"{SIGN}({NUMBER})(k|K|M|mn|B|bn|tn)\b(?!\.\w)", DIGITS)
def large(m):
    amounts = {"K": len(m[2]) in (2, 3), "B": "." in m[2] or re.match(" [a-z]+s\\b", after(m, 20))}  # 4K, Terminal 2B
    if amounts.get(m[3], True):
        return f"{sign_of(m)}{number(m[2])} {LARGE[m[3]]}"


@rule(
    r"(?:(?<=[²³])|(?<=\^[0-9a-z])|(?<=\^[0-9]{2})) ?[-−] ?(?=[0-9a-z])|(?<=[xyz]) [-−] (?=[0-9]{0,4}[yz]\b)"
    r"|(?<=\b[ijknxyz]) [-−] (?=[0-9]{1,9}(?![\w.,]))",
    "-−",
)
def algebraic_minus(m):
    return " minus "


@rule(
    rf"(?<=[\w)])(?<![{SUPERSCRIPTS}])(?:\^([23])(?![0-9.])|([{SUPERSCRIPTS}⁺⁻ⁿ]{{1,6}})|\^(?=[-−]?[0-9a-z])|\^[({{]([-−]?\w{{1,6}})[)}}])",
    "^ⁿ⁺⁻" + SUPERSCRIPTS,
)
def power(m):
    raised = m[1] or m[2]
    if m[3]:
        return f" to the power of {m[3]}"
    if m[2] and re.search(r"[a-z]{4}$", before(m, 4)) and not before(m, 6).endswith("meters"):
        return ""  # a footnote's number
    if not raised or raised in POWERS:
        return POWERS.get(raised, " to the power of ")
    if raised[-1] in "⁺⁻":  # an ion
        raised = f" {raised[:-1].translate(str.maketrans(SUPERSCRIPTS, DIGITS))}".rstrip()
        return raised + (" plus" if m[2][-1] == "⁺" else " minus")
    plain = raised.translate(str.maketrans(SUPERSCRIPTS + "⁺⁻ⁿ", "0123456789+-n"))
    return " to the power of " + plain.replace("+", "plus ").replace("-", "minus ")


@rule(rf"(?<![\w)])([{SUPERSCRIPTS}]{{1,3}})(?=[A-Z])", SUPERSCRIPTS)
def isotope(m):
    return m[1].translate(str.maketrans(SUPERSCRIPTS, DIGITS)) + " "


@rule("√ ?(?=[\\w(])|∛|∞", "√∛∞")
def roots(m):
    return {"√": "the square root of ", "∛": "the cube root of ", "∞": "infinity"}[m[0][0]]


@rule(r"(?<![\w.])([A-Za-z]|sin|cos|tan|log|ln|exp)\(([A-Za-z]|[0-9]{1,4}|π|θ)\)(?![\w(])", "(")
def function_of(m):
    names = {"sin": "sine", "cos": "cosine", "tan": "tangent", "ln": "natural log", "exp": "exponential"}
    return f"{names.get(m[1], m[1])} of {m[2]}"


@rule(
    r"(?<=[0-9a-z]) - (?=[0-9a-z.]{1,12} ?=)|(?<=[0-9]) - (?=[0-9]{1,9} [-+*/×÷=])",
    "-",
)
def minus(m):
    return " minus "


@rule(r"(?<=[0-9])( ?)[*∗·⋅](?: ?)(?=[0-9])|(?<=\b[a-z]) [*∗·⋅] (?=[a-z0-9]\b)", "*∗·⋅")
def multiplied(m):
    return " times "


@rule(r"(?<=[0-9]) / (?=[0-9])", "/")
def divided(m):
    return " divided by "


@rule(
    r"(?<=[\w)\]²³]) ?(==|!=|<=|>=|[=×÷≠<>≤≥≈±−]) ?(?=[\w(.√-])|(?<=[\w)\]]) (\+) (?=[\w(])"
    r"|(?<=[0-9])(\+)(?=[0-9])|(?<!\S)([=<>≤≥≠]) ?(?=[0-9])",
    "=!<>×÷≠≤≥≈±−+",
)
def operator(m):
    sign = m[1] or m[2] or m[3] or m[4]
    if sign in ("<", ">") and not (m[4] or m[0][-1] == " " or after(m).isdigit() or after(m) == "."):
        return None
    said = OPERATORS[sign]
    return f"{said.removeprefix('is ')} " if m[4] else f" {said} "


@rule(r"(?<![\w-])([a-z])([-−+])(?=[0-9]{1,4}(?![\w-]))", "-−+")
def one_letter_and(m):
    return f"{m[1]} {'plus' if m[2] == '+' else 'minus'} "


@rule(r"±(?=[A-Za-z])", "±")
def plus_or_minus(m):
    return "plus or minus "


@rule(r"(?<=[A-Za-z]):(?=[0-9])|(?<=\b[A-Z])\.(?=[0-9])", ":.")
def glued(m):
    return ": " if m[0] == ":" else " dot "


@rule(r"(?<=UTC|GMT)[+−-](?=[0-9])", "TG")
def time_zone(m):
    return " plus " if m[0] == "+" else " minus "


@rule(r"(?<=[0-9a-z])\+(?=[\s,.;:!?)]|$)", "+")
def and_more(m):
    return " plus"


@rule(r" ?(?:<?[-=]{1,4}>|[→⇒⟶➜➔↦←⇐↔⇔]) ?", ">→⇒⟶➜➔↦←⇐↔⇔")
def arrow(m):
    return ", "


@rule(
    rf"(?<![\w.,/-])([0-9]{{1,15}}(?:,[0-9]{{3}}){{0,4}}(?:\.[0-9]{{1,9}})?)(?: ?– ?|-| - | — |—|:)({NUMBER})"
    r"(?![\w]|[-/][0-9])",
    DIGITS,
)
def range_of_numbers(m):
    first, second = m[1], m[2]
    if re.fullmatch("(?:1[0-9]|20)[0-9]{2}", first) and len(second) == 2:
        return f"{year_or_number(first)} to {number(second)}"
    return f"{year_or_number(first)} to {year_or_number(second)}"


@rule(r"(?<![\w)\]%.,'\"])[-−](?=\.?[0-9])|(?<!\w)\+(?=[0-9])|(?<!\w)[~≈±](?=[0-9])", DIGITS)
def sign(m):
    return SIGNS[m[0]]


@rule(r"(?<![\w.-])([A-Z]{1,5})-?([1-9][0-9]{2,3})(?![\w-]|[.,][0-9])", DIGITS)
def model_number(m):
    return f"{m[1]} {in_pairs(int(m[2]))}"


@rule(r"\b([1-9][0-9])ers\b", "e")
def team(m):
    said = cardinal(int(m[1]))
    return f"{said}rs" if said.endswith("e") else f"{said}ers"


@rule(
    r"(?<=[A-Za-z])-(?=[0-9])|(?<=[0-9])(?=[^\W\d_])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=°)|(?<=[°′″])(?=[0-9])|_(?=[0-9])",
    DIGITS,
)
def letters_and_digits(m):
    return " "


@rule(r"[(\[]([0-9]{1,3})[)\]]|(?<!\w)['’]([0-9]{2})\b(?!['’])", DIGITS)
def bare_number(m):
    if m[1]:
        said = f" {m[1]}" if before(m).isalnum() else m[1]
        return f"{said} " if after(m).isalnum() else said
    return f"oh {cardinal(int(m[2]))}" if m[2][0] == "0" else m[2]


@rule(r"(?<=[0-9]),(?=[0-9])(?![0-9]{3}(?![0-9]))", DIGITS)
def list_of_numbers(m):
    return ", "


@rule(rf"(?<![0-9])(?:{NUMBER}|(?<![\w.])\.[0-9]{{1,15}})", DIGITS)
def numbers(m):
    return year_or_number(m[0])


# Signs alone


@rule("(?<![\u0370-\u03ff])[Α-Ωα-ω](?![\u0370-\u03ff])")
def greek(m):
    name = unicodedata.name(m[0]).rpartition(" ")[2].lower()
    return f"{' ' if before(m).isalnum() else ''}{name}{' ' if after(m).isalnum() else ''}"


@rule("&&?", "&")
def ampersand(m):
    return ("" if before(m) in ("", " ", "\n") else " ") + "and" + ("" if after(m) in ("", " ", "\n") else " ")


@rule(rf"\b({words_of(EITHER)})\b", "/", re.IGNORECASE)
def either(m):
    return EITHER[m[0].lower()]


@rule(r"(?<=[^\W_])/(?=[^\W_])| / ", "/")
def slash_between(m):
    return " " if m[0] == "/" else ", "


@rule(r"§§? ?(?=\w)|¶ ?(?=[0-9])|°|©|[®™†‡]", "§¶°©®™†‡")
def rare_signs(m):
    if m[0][0] == "¶" or m[0].startswith("§§"):
        return "paragraph " if m[0][0] == "¶" else "sections "
    return {"§": "section ", "¶": "paragraph ", "°": " degrees", "©": "copyright"}.get(m[0][0], "")


@rule(r"[“”„«»‟]|[‘’‚‛`´]", "“”„«»‟‘’‚‛`´")
def quotes(m):
    return '"' if m[0] in "“”„«»‟" else "'"


@rule(r"(?<![.…])…|\.(?: \.){2,}", ".…")
def ellipsis(m):
    return "..."


@rule(r"(?<!\S)(--|-)(?=[A-Za-z])(?=[a-z]\w|\w\b)", "-")
def option(m):
    return "dash dash " if m[1] == "--" else "dash " if re.match(r"\w\b", after(m, 2)) else None


@rule(r"[ \n]?(?:—|―|–|(?<!-)---?(?!-)|(?<=[ \n])-(?=[ \n]))[ \n]?", "-—―–")
def dash(m):
    gap = "\n" if "\n" in m[0] else " "
    if before(m) in ("", "\n"):
        return ""
    if before(m) in ".!?,;:":
        return gap if m[0].strip() != m[0] else ""
    return "," if after(m) in ("", '"', "'", "\n") or after(m) in ".!?,;:" else f",{gap}"


@rule(r"(?<=[^\W_])\(s\)", "(")
def optional_plural(m):
    return "s"


@rule(r" ?[(\[{]", "([{")
def opening(m):
    if (
        before(m) in ("", "\n")
        or before(m) in ".!?,;:([{"
        or (before(m) in "\"'" and (m[0][0] != " " or before(m, 2)[0] in ".!?,;:"))
    ):
        return m[0][:-1]
    return ", "


@rule(r"(?<=\.)[)\]}]\.(?!\.)|[)\]}]", ")]}")
def closing(m):
    if after(m) in ("", "\n") or after(m) in ".,;:!?)]}\"'":
        return ""
    return ("" if before(m) in (*".,;:!?", "") else ",") + ("" if after(m) == " " else " ")


@rule(r" ?[|•·∙‖¦] ?", "|•·∙‖¦")
def bar(m):
    return ", "


# ------------------------------------------------------------------------------------- markup

TAGS = """
a abbr audio b blockquote body br caption center cite code del details div em emphasis font h1 h2 h3 h4 h5 h6 head hr
html i img ins kbd lang li mark ol p pre prosody q s samp say-as small speak span strike strong sub summary sup table
tbody td th thead title tr tt u ul var voice
""".split()
TAG = re.compile(rf"<!--.{{0,500}}?-->|</?({'|'.join(TAGS)})\b(?:\s[^<>]*)?/?>", re.IGNORECASE | re.DOTALL)
BREAKING = {"br", "p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "blockquote", "ul", "ol", "table"}
EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u2793\u27b0\u27bf\u2b00-\u2bff\u2300-\u23ff\u25a0-\u25ff\ufe0f\u200d\u20e3\U000e0020-\U000e007f]"
)
EMOTICON = re.compile(r"(?<!\S)(?:[:;=8][-'o]?[)(\]DPp|/\\]|<3|\^_\^|xD|XD)(?=[\s.,!?]|$)")
IMAGE_OR_LINK = re.compile(
    r"""!?\[([^\[\]]{0,300})\]\([^()\s]{0,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?(?:\s["'][^"'\n]{0,200}["'])?\)"""
)
REFERENCE = re.compile(
    r"""\[\^[^\]\s]{1,20}\]|(?<=[\w.,!?"'”’)\]])\[[0-9]{1,3}(?:[,–-] ?[0-9]{1,3}){0,9}\]"""
    r"""|\[([^\[\]]{1,300})\]\[[^\[\]]{0,100}\]"""
)
PLACEHOLDER = re.compile(r"<([A-Za-z][\w-]{0,40})>")
AUTOLINK = re.compile(r"<((?:https?://|mailto:)?[^<>\s]{1,500}[.@/:][^<>\s]{1,500})>")
BULLET = re.compile(r"[ \t]*(?:[-*+•◦▪●○‣▸►·✓✔✅❌☑➤→–][ \t]+|[●•‣▸►✓✔✅❌☑➤])(?:\[[ xX]?\][ \t]+)?(?=\S)")
LIST_NUMBER = re.compile(r"[ \t]*([0-9]{1,3})(?:[.)][ \t]+|\ufe0f?\u20e3[ \t]*)(?=\S)")
HEADING = re.compile(r"[ \t]{0,3}#{1,6}[ \t]+(?=\S)")
QUOTED = re.compile(r"[ \t]*>[> \t]*")
DEFINITION = re.compile(r"[ \t]*\[([^\[\]]{1,100})\]:[ \t]")
CLOSERS = "*_~`\"'”’)] \t"


def plain(text):
    """Remove Markdown's signs line by line; end headings, list items and table rows like sentences."""
    lines, out = text.split("\n"), []
    fence, open_item = "", False

    def end():
        if open_item and out:
            out[-1] = ended(out[-1])

    for i, line in enumerate(lines):
        bare = line.strip()
        if bare[:3] in ("```", "~~~") and (not fence or bare == fence):
            end()
            fence, open_item = "" if fence else bare[:3], False
            continue
        if fence:
            out.append(line)
            continue
        if bare.startswith(">"):
            line = line[QUOTED.match(line).end() :]
            bare = line.strip()
        if len(bare) > 2 and not bare.strip("-=_*~|:+ \t"):  # a rule, or the line below a table's header
            open_item = True if bare[0] in "=-" and "|" not in bare and out and out[-1].strip() else open_item
            end()
            open_item = False
            if "|" not in bare:
                out.append("")
            continue
        if not bare:
            end()
            open_item = False
            out.append(line)
        elif "|" in bare and ((bare[0] == bare[-1] and len(bare) > 1) or in_table(lines, i)):
            end()
            cells = [cell.strip() for cell in bare.strip("|").replace("\\|", "/").split("|")]
            out.append(", ".join(cell for cell in cells if cell))
            open_item = True
        elif m := HEADING.match(line):
            end()
            out.append(line[m.end() :].rstrip("# \t"))
            open_item = True
            end()
            open_item = False
        elif m := LIST_NUMBER.match(line):
            end()
            out.append(f"{m[1]}. {line[m.end() :]}")
            open_item = True
        elif m := BULLET.match(line):
            end()
            out.append(line[m.end() :])
            open_item = m[0].strip()[0] not in "–→"
        elif m := DEFINITION.match(line):
            if m[1].startswith("^"):
                out.append(line[m.end() :])
        else:
            out.append(line)
    end()
    return "\n".join(out)


def in_table(lines, i):
    """Whether the line above or below is a table's line of dashes."""
    near = lines[i + 1 : i + 2] + lines[max(i - 1, 0) : i]
    return any("-" in line and "|" in line and not line.strip("-|: \t") for line in near)


def ended(line):
    """Add a full stop to a line that ends without a mark."""
    words = line.rstrip()
    last = words.rstrip(CLOSERS)[-1:]
    return line if not last or last in ".!?…:;,。！？؟۔।" else f"{words}."


def emphasis(m):
    """Drop stars and underscores, but make an underscore inside a name a space, and keep the star of 2 * 3."""
    left, right = before(m), after(m)
    if m[0] == "**" and right.isdigit() and re.search(r"(?<![A-Za-z])[\w)]$", before(m, 2)):
        return "^"
    if m[0] == "*" and (left == right == " " or (left.isdigit() and right.isdigit())):
        return m[0]
    return " " if m[0][0] == "_" and left.isalnum() and right.isalnum() else ""


def emoji_name(m):
    name = unicodedata.name(m[0], "").lower()
    if (
        not name
        or "selector" in name
        or "joiner" in name
        or "indicator" in name
        or "tag " in name
        or "modifier" in name
    ):
        return ""
    return f", {name}, " if after(m, 4).strip("\ufe0f\u200d \n") else f", {name}"


def lowered(m):
    """Lower a shouted sentence: one without lower-case letters that is more than names in capitals."""
    words = re.findall(r"[A-Z]+['’]?[A-Z]+", m[0])
    if len(words) < 2 or any(c.islower() for c in m[0]):
        return m[0]
    if not any(word in SHOUTED or (len(word) > 4 and word not in ACRONYMS) for word in words):
        return m[0]

    def word(w):
        if w[0] in ACRONYMS or w[0] == "I" or (len(w[0]) > 1 and not re.search("[AEIOUY]", w[0])):
            return w[0]
        return w[0].capitalize() if w[0][:2] in ("I'", "I’") else w[0].lower()

    text = re.sub(r"[A-Z]+(?:['’][A-Z]+)?", word, m[0])
    first = re.search("[a-zA-Z]", text).start()
    return text[:first] + text[first].upper() + text[first + 1 :]


# ------------------------------------------------------------------------------------- spoken

PAUSE = re.compile(
    r"""\[pause:? ?([0-9]{1,4}(?:\.[0-9]{1,3})?|\.[0-9]{1,3}) ?(m?s)?\]"""
    r"""|<break(?:\s+strength="[a-z-]{1,10}")?(?:\s+time="([0-9]{1,6}(?:\.[0-9]{1,3})?|\.[0-9]{1,3}) ?(m?s)")?"""
    r"""[^<>]{0,40}/?>(?:</break>)?""",
    re.IGNORECASE,
)
LONGEST_PAUSE = 10  # seconds
LETTER, LATIN = re.compile(r"[^\W\d_²³¹¼-¾⁰-₉⅐-⅟]"), re.compile(r"[A-Za-z\u00c0-\u024f]")


def spoken(text, emoji=False):
    """The words to speak for `text`. emoji: speak the emoji's names, too."""
    for _ in range(5):  # repeat for what signs hid from the rules, so that spoken() is idempotent
        out, start = [], 0
        for m in PAUSE.finditer(text):
            out += [said(text[start : m.start()], emoji), m[0]]
            start = m.end()
        new = "".join([*out, said(text[start:], emoji)])
        if new == text:
            break
        text = new
    return text


def said(text, emoji):
    """spoken() of a text without pauses."""
    if "&" in text:
        text = html.unescape(text)
    text = re.sub("[\u00a0\u2007\u2009\u200a\u202f]", " ", text.replace("\r\n", "\n"))
    text = re.sub("[\u00ad\u200b\u2060\ufeff]", "", text)
    text = TAG.sub(lambda m: "\n" if (m[1] or "").lower() in BREAKING else "", text)
    text = plain(text)
    return "".join(
        block if block.isspace() else said_block(block, emoji) for block in re.split(r"(\n[ \t]*\n\s*)", text)
    )


def said_block(block, emoji):
    """spoken() of a paragraph. Tidies spaces and commas if anything changed."""
    old = block
    for _ in range(2):  # a link's text may be an image
        block = IMAGE_OR_LINK.sub(r"\1", block)
    block = REFERENCE.sub(lambda m: m[1] or "", block)
    block = AUTOLINK.sub(r"\1", block)
    block = PLACEHOLDER.sub(lambda m: f"{' ' if before(m).isalnum() else ''}{m[1]}", block)
    block = EMOTICON.sub("", block)
    for c, plainer in VULGAR.items():
        if c in block:
            block = re.sub(rf"(?<=[0-9]){c}", f" {plainer}", block).replace(c, plainer)
            block = re.sub(rf"{plainer}(?=[^\W\d_])", f"{plainer} ", block)
    block = re.sub("(?<=[0-9])⁄(?=[0-9])", "/", block)
    block = re.sub("(?<=[0-9])( ?)º(?=[CF]?\\b|[CF ,.;)])", r"\1°", block)
    letters = LETTER.findall(block)
    if 2 * len(LATIN.findall(block)) >= len(letters):
        block = re.sub("(?<=[A-Za-z)\\]])[₀-₉]+", lambda m: m[0].translate(SUBSCRIPTS), block)
        block = re.sub("(?<=[0-9])[★⭐]", " star", block)
        block = re.sub("[★⭐]+(?=☆)", lambda m: f" {cardinal(min(len(m[0]), 99))} star{'s' * (len(m[0]) > 1)} ", block)
        block = re.sub(r"(?<=\bI )[♥❤]\ufe0f?(?= )", "love", block)
        block = re.sub(r"(?<=\b[A-G])[♭♯]", lambda m: " flat" if m[0] == "♭" else " sharp", block)
        block = re.sub(r"[^.!?\n]+", lowered, block)
        block = apply(ADDRESSES, block)  # before the Markdown, because their underscores are spoken
        block = re.sub(r"\\(?=[*_`#\[\]()~>|.!+-])", "", block)
        block = re.sub(r"\*+|_+|~~+|`+", emphasis, block)
        block = EMOJI.sub(emoji_name if emoji else " ", block)
        block = apply(RULES, block)
    else:
        block = re.sub(r"\*+|_+|~~+|`+", emphasis, block)
        block = EMOJI.sub(emoji_name if emoji else " ", block)
    if block == old:
        return block
    block = re.sub(r"[ \t]{2,}", " ", block)
    block = re.sub(r" (?=[,.;:!?]+(?:\s|$))", "", block)
    block = re.sub(r",(?: ?,)+", ",", block)
    block = re.sub(r",(?=[.;:!?])", "", block)
    return re.sub(r"(?m)^[ ,]+|[ ]+$", "", block)


# ------------------------------------------------------------------------------------- sentences

log = logging.getLogger("csm")

PAUSES = {"paragraph": 0.7, "sentence": 0.25, "part": 0.05}  # seconds after each
LONGEST = 240  # characters spoken at once; longer sentences are cut at commas, or between words
SHORTEST = 20  # bytes; shorter sentences join the next, because single words are spoken less well
NARROW = 40  # characters; prose is never wrapped so narrowly, so shorter lines have meant breaks
NEAR = 40  # characters to look at around a mark
# A sentence does not end after these or an initial,
ABBREVIATIONS = """
mr mrs ms dr messrs mme mlle prof rev fr st sr jr esq gen col maj capt cmdr adm lt sgt hon pres gov sen rep univ mt ft
ave blvd rd vs cf al ca approx dept est inc ltd co corp bros ed eds viz e.g i.e eg ie aka a.k.a
""".split()
NUMBERED = "no nos art fig sec vol ch p pp".split()  # nor after these before a number,
DATES = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun".split()  # or these, capitalized
ALWAYS = "。！？।॥؟۔։።။៕"  # always end a sentence
LIST_NUMBERS = {cardinal(n) for n in range(1, 100)}
END = re.compile(rf"""(?:(?<![.!?…])(?:\.(?: \.)+|[.!?…]+)['"’”)\]]*(?:\[\d+\])*(?=\s)|[{ALWAYS}]+[」』”’"')\]]*)\s*""")
WORD = re.compile(r"[^\W_]")  # parts without any are not spoken
ITEM = re.compile(r"[ \t]*(?:#{1,6}[ \t]|[-*+•◦▪●–][ \t]|[0-9]{1,3}[.)][ \t])")
WHOLE_PREFIXES = """
self well non ex half high low all cross long short full ill so two three four five six seven eight nine ten twenty
thirty forty fifty sixty seventy eighty ninety old new first second third last mid anti post pre semi co by good great
""".split()


def parts_of(text, verbatim=False, longest=LONGEST, together=0):
    """Normalize a text and split it into `sentences`, without silence at the end unless a pause is written there.

    verbatim: skip `spoken`. Raises ValueError if there is nothing to say.
    """
    if not verbatim:
        text = spoken(text)
        log.debug("said as: %s", text)
    parts = sentences(text, longest, together)
    if not parts:
        raise ValueError("the text is empty: it has no words to say")
    *_, last = [None, *PAUSE.finditer(text)]
    if last is None or WORD.search(text, last.end()):
        parts[-1] = parts[-1][0], 0
    return parts


def sentences(text, longest=LONGEST, together=0):
    """Text -> [(a sentence or a part of one, the seconds of silence after it)]. A blank line ends a paragraph.

    longest: characters in a part. together: text between two pauses stays one part up to so many characters.
    [pause:1.5] and <break time="1.5s"/> add that much silence, but nothing before the first word.
    """
    out, start = [], 0
    for m in [*PAUSE.finditer(text), None]:
        chunk, parts = text[start : m.start() if m else None], []
        if len(chunk.strip()) <= together:
            parts = [(" ".join(chunk.split()), PAUSES["paragraph"])] if WORD.search(chunk) else []
        else:
            for paragraph in re.split(r"\n[^\S\n]*\n\s*", chunk):
                parts += paragraph_parts(paragraph, longest)
        out += parts
        if m is None:
            return out
        if out:
            held = 0 if parts else out[-1][1]  # adjacent pauses add up
            out[-1] = out[-1][0], min(held + pause_length(m), LONGEST_PAUSE)
        start = m.end()


def pause_length(m):
    """Seconds of a match of PAUSE; <break/> without a time is as long as between paragraphs."""
    for length, name in ((m[1], m[2]), (m[3], m[4])):
        if length:
            return min(float(length) / (1000 if (name or "").lower() == "ms" else 1), LONGEST_PAUSE)
    return PAUSES["paragraph"]


def paragraph_parts(paragraph, longest):
    said = []
    for block in blocks(paragraph):
        fresh = True
        for part in block_sentences(block):
            if said and len(said[-1].strip().encode()) < SHORTEST:
                # A line is a sentence of its own: the end mark between them becomes a pause.
                joint = ". " if fresh and said[-1].strip()[-1:].isalnum() else " " if fresh else ""
                said[-1] += joint + part
            else:
                said.append(part)
            fresh = False
    out = []
    said = [part.strip() for part in said if WORD.search(part)]
    for i, sentence in enumerate(said):
        *first, last = cut(sentence, longest)
        pause = PAUSES["paragraph" if i == len(said) - 1 else "sentence"]
        out += [(part, PAUSES["part"]) for part in first] + [(last, pause)]
    return [(part, pause) for part, pause in out if WORD.search(part)]


def blocks(paragraph):
    """Join the lines of a paragraph that were wrapped; keep the breaks that are meant."""
    lines = [line for line in paragraph.split("\n") if line.strip()]
    width = max((len(line.strip()) for line in lines), default=0)
    block, out = "", []
    for i, line in enumerate(lines):
        block = joined_lines(block, " ".join(line.split()))
        if i + 1 == len(lines) or breaks(line, lines[i + 1], width):
            out.append(block)
            block = ""
    return out


def joined_lines(first, second):
    """exam- and ple -> example; self- and made -> self-made"""
    word = re.search(r"(?<![^\W_])([^\W\d_]{1,40})-$", first[-NEAR:])
    if not first or not word or not second[:1].islower():
        return f"{first} {second}".strip()
    return (first if word[1].lower() in WHOLE_PREFIXES else first[:-1]) + second


def breaks(line, following, width):
    """Whether the break between two lines is meant: at a list item or heading, or if the next word had ample room.

    width: of the longest line. A line that starts in lower case or with a number continues the sentence, unless the
    line before is short.
    """
    line, start = line.strip(), following.split()[0]
    if line[-1] == "-" and start[0].islower():  # a hyphenated word
        return False
    room = width < NARROW or len(line) + 1 + len(start) <= 0.85 * width
    if m := ITEM.match(following):
        return room or not m[0].strip()[0].isdigit() or line[-1] in ".:;!?,"
    if re.match(r"#{1,6}\s", line):
        return True
    return room and (len(line) < 25 or not (start[0].islower() or start[0].isdigit() or start[0] == "("))


def block_sentences(text):
    """Text without line breaks -> its sentences, with the space after them."""
    start, seen, cased = 0, 0, False
    for end in END.finditer(text):
        chunk = text[seen : end.start()]
        cased, seen = cased or chunk != chunk.lower(), end.start()
        if ends_here(
            text[max(start, end.start() - NEAR) : end.start()], end[0], text[end.end() : end.end() + NEAR], cased
        ):
            yield text[start : end.end()]
            start, cased = end.end(), False
    if start < len(text):
        yield text[start:]


def ends_here(before, mark, after, cased):
    """Whether `mark` ends the sentence, instead of an abbreviation or a quotation inside it.

    before, after: the text near it. cased: whether the sentence has capitals.
    """
    if not after or mark[0] in ALWAYS:
        return True
    following = after.lstrip("'\"‘“([¿¡—–- ")[:1]
    if following.islower() and (cased or ". ." in mark):  # "Stop!" he cried. He waited ... and left.
        return False
    word = re.search(r"[\w.]*$", before)[0]
    if mark.strip() != ".":
        return True
    if word.lower() in ABBREVIATIONS:
        return False
    if re.fullmatch(r"([^\W\d]\.)+[^\W\d]", word):  # J.R.R. Tolkien; at 5 p.m. Then
        return word.islower() and following.isupper()
    if (len(word) == 1 and word.isalpha() and word != "I") or re.fullmatch(r"[0-9]{1,2}", before.strip()):
        return False
    if before.strip().lower() in LIST_NUMBERS:  # One. Mix the eggs.
        return False
    low = word.lower()
    if low in NUMBERED or (low in DATES and word[0].isupper()):
        return not following.isdigit()
    return True


def cut(sentence, longest=LONGEST):
    """Cut a sentence into parts of at most `longest` characters, if possible without a single word at the end."""
    parts, start, few = [], 0, longest // 8
    while (left := len(sentence) - start) > longest:
        head = sentence[start : start + longest]
        for mark, rest in (
            (r"[.!?…]\s+", few),
            (r"(?:[;:,]\s+|[，、—–]\s*)", few),
            (r"\s+", few),
            (r"\s+", 0),
            (".$", 0),
        ):
            ends = [m.end() for m in re.finditer(mark, head) if longest // 3 < m.end() <= left - rest]
            if ends:
                break
        parts.append(head[: ends[-1]].strip())
        start += ends[-1]
        start += re.match(r"\s*", sentence[start : start + longest]).end()
    return [*parts, sentence[start:].strip()]
