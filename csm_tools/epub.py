"""Read the chapters of an EPUB: XHTML files in a zip, in the order of its package document (w3.org/TR/epub)."""

import posixpath
import re
import zipfile
import zlib
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

LARGEST = 64 * 2**20  # bytes of a file in the zip, uncompressed
BLOCKS = frozenset(
    "address article aside blockquote body br dd div dl dt figcaption figure footer h1 h2 h3 h4 h5 h6 header hr li main"
    " nav ol p pre section table td th tr ul".split()
)
UNSAID = frozenset("audio head math rp rt script style svg video".split())  # and notes, see Text
NOTE_MARK = re.compile(r"\s*[\[(]?(?:[0-9]{1,3}|[*†‡§¶]{1,3})[\])]?\s*")
DAMAGED = (  # raised if a file is not an EPUB, is incomplete or encrypted
    zipfile.BadZipFile, zlib.error, ElementTree.ParseError, KeyError, AttributeError, TypeError, NotImplementedError,
    RuntimeError, UnicodeError,
)  # fmt: skip


def chapters(path):
    """A path -> [text], one for each file that has words; blank lines separate paragraphs. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as book:
            texts = [text_of(read(book, name)) for name in spine(book)]
    except DAMAGED as e:
        raise ValueError(f"{path} cannot be read as an EPUB ({type(e).__name__}: {e})") from None
    return [text for text in texts if re.search(r"[^\W_]", text)]


def read(book, name):
    if book.getinfo(name).file_size > LARGEST:
        raise ValueError(f"{book.filename}: {name} is larger than {LARGEST} bytes")
    return book.read(name).decode("utf-8-sig")


def spine(book):
    """Yield the names of the text's files in reading order, without the table of contents."""
    container = ElementTree.fromstring(read(book, "META-INF/container.xml"))
    package_name = container.find(".//{*}rootfile").get("full-path")
    package = ElementTree.fromstring(read(book, package_name))
    files = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
    for ref in package.iterfind(".//{*}spine/{*}itemref"):
        item = files[ref.get("idref")]
        if ref.get("linear") == "no":  # beside the text: notes, advertisements
            continue
        if "html" in item.get("media-type", "") and "nav" not in item.get("properties", "").split():
            yield posixpath.normpath(posixpath.join(posixpath.dirname(package_name), unquote(item.get("href"))))


def text_of(xhtml):
    parser = Text()
    parser.feed(xhtml)
    parser.close()
    paragraphs = (" ".join(paragraph.split()) for paragraph in "".join(parser.pieces).split("\0"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


class Text(HTMLParser):
    """Collects the text in `pieces`, with a zero byte where a block begins or ends."""

    def __init__(self):
        super().__init__()
        self.pieces, self.unsaid = [], []  # unsaid: open tags whose text is left out
        self.link = None  # where in `pieces` a link to a place begins, which may be a note's mark

    def handle_starttag(self, tag, attributes):
        if tag in BLOCKS:
            self.pieces.append("\0")
        if tag == "a":
            self.link = len(self.pieces) if "#" in (dict(attributes).get("href") or "") else None
        kinds = " ".join(value or "" for name, value in attributes if name in ("epub:type", "role"))
        if self.unsaid or tag in UNSAID or "noteref" in kinds or "pagebreak" in kinds:
            if tag not in ("br", "hr", "img", "link", "meta", "col", "input", "source", "wbr"):
                self.unsaid.append(tag)

    def handle_startendtag(self, tag, attributes):
        if tag in BLOCKS:
            self.pieces.append("\0")

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self.pieces.append("\0")
        if tag == "a" and self.link is not None:
            if NOTE_MARK.fullmatch("".join(self.pieces[self.link :])):
                del self.pieces[self.link :]
            self.link = None
        if tag in self.unsaid:
            while self.unsaid.pop() != tag:
                pass

    def handle_data(self, data):
        if not self.unsaid:
            self.pieces.append(data.replace("\0", " "))
