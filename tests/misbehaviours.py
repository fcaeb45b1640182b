"""How an HTTP origin can misbehave, each way a small function in a table under its own name.

`ON_REQUEST` holds those that answer a request, `ON_ACCEPT` those that do not wait for one. What a fetcher is
to make of each stands in frontend/test_rude_origin.py.
"""

from __future__ import annotations

import gzip
from email.utils import formatdate
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from helpers import Exchange

Misbehaviour = Callable[["Exchange"], None]

ON_REQUEST: dict[str, Misbehaviour] = {}
ON_ACCEPT: dict[str, Misbehaviour] = {}
REFUSES = "refuses"  # its port is bound and nobody listens; the one that needs no function

ZEROS = bytes(64 << 10)
POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"


def rude(act: Misbehaviour) -> Misbehaviour:
    """Put a misbehaviour into the table of those that answer a request."""
    ON_REQUEST[act.__name__] = act
    return act


def rude_at_once(act: Misbehaviour) -> Misbehaviour:
    """Put a misbehaviour into the table of those that wait for no request."""
    ON_ACCEPT[act.__name__] = act
    return act


def rude_when_resumed(act: Misbehaviour) -> Misbehaviour:
    """Cut the first answer in its middle, let `act` answer whoever continues, and serve well otherwise."""

    def cut_first(x: Exchange) -> None:
        if x.number == 1:
            short_body(x)
        elif x.offset:
            act(x)
        else:
            x.answer_well()

    ON_REQUEST[act.__name__] = cut_first
    return act


def flipped(data: bytes) -> bytes:
    """Return the bytes with one bit of the middle one wrong."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# ------------------------------------------------------------------ bodies


@rude
def short_body(x: Exchange) -> None:
    """Close in the middle of what was announced."""
    x.start(length=len(x.body))
    x.send(x.half)


@rude
def long_body(x: Exchange) -> None:
    """Announce and send more than there is."""
    x.answer(x.body + b"more")


@rude
def flipped_bit(x: Exchange) -> None:
    """Send one wrong bit."""
    x.answer(flipped(x.body))


@rude
def other_bytes_shorter(x: Exchange) -> None:
    """Send another, shorter file, all of it."""
    x.answer(b"something else\n")


@rude
def endless_body_announced(x: Exchange) -> None:
    """Announce a terabyte and send it."""
    x.start(length=1 << 40)
    while True:
        x.send(ZEROS)


@rude
def endless_body_without_length(x: Exchange) -> None:
    """Send for ever, announcing nothing."""
    x.start()
    while True:
        x.send(ZEROS)


@rude
def endless_body_chunked(x: Exchange) -> None:
    """Send chunks for ever."""
    x.start("Transfer-Encoding: chunked")
    while True:
        x.chunk(ZEROS)


@rude
def endless_rest(x: Exchange) -> None:
    """Send the right bytes, and then never stop."""
    x.start(length=len(x.body))
    x.send(x.body[:-1])
    x.send(x.body[-1:] + ZEROS[:1000])  # at once: who has the body has some of the rest
    while True:
        x.send(ZEROS)


@rude
def dripping_body(x: Exchange) -> None:
    """Send a byte every 50 ms."""
    x.start(length=len(x.body))
    for byte in x.body:
        x.send(bytes([byte]))
        x.pause(0.05)


@rude
def steady_drip(x: Exchange) -> None:
    """Send 20 KB a second: not too slow for anybody, and no end in sight."""
    x.start(length=len(x.body))
    for at in range(0, len(x.body), 1000):
        x.send(x.body[at : at + 1000])
        x.pause(0.05)


@rude
def second_answer_after_the_body(x: Exchange) -> None:
    """Send an answer that nobody asked for, behind the right one: poison for the next request."""
    x.start(length=len(x.body))
    x.send(x.body + POISON)  # at once, so that whoever has the last byte of the body has the rest, too
    x.keeps_open = True


@rude
def content_changes(x: Exchange) -> None:
    """Cut a wrong file in its middle, and have the right one when it is continued."""
    if x.number > 1:
        return x.answer_well()
    x.start(length=len(x.body), tag='"an older version"')
    return x.send(flipped(x.body)[: len(x.body) * 3 // 4])


# ------------------------------------------------------------------ silence


@rude_at_once
def never_reads(x: Exchange) -> None:
    """Accept and do nothing."""
    x.ignore()


@rude
def stalled_before_status(x: Exchange) -> None:
    """Read the request and say nothing."""
    x.stall()


@rude
def stalled_in_header(x: Exchange) -> None:
    """Stop in the header."""
    x.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    x.stall()


@rude
def stalled_in_body(x: Exchange) -> None:
    """Stop in the middle of the body."""
    x.start(length=len(x.body))
    x.send(x.half)
    x.stall()


@rude
def slow_loris_header(x: Exchange) -> None:
    """Send a byte of header every 50 ms, for ever."""
    x.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        x.send(b"a")
        x.pause(0.05)


# ------------------------------------------------------------------ Content-Length


@rude
def length_short(x: Exchange) -> None:
    """Announce half of what is sent."""
    x.start(length=len(x.half))
    x.send(x.body)


@rude
def length_long(x: Exchange) -> None:
    """Announce more than is sent, and close."""
    x.start(length=len(x.body) + 10)
    x.send(x.body)


@rude
def length_negative(x: Exchange) -> None:
    """Announce -1 bytes."""
    x.start(length=-1)
    x.send(x.body)


@rude
def length_not_a_number(x: Exchange) -> None:
    """Announce no number."""
    x.start(length="many")
    x.send(x.body)


@rude
def length_with_sign(x: Exchange) -> None:
    """Announce a number that only Python takes for one."""
    x.start(length=f"+{len(x.body)}")
    x.send(x.body)


@rude
def lengths_differ(x: Exchange) -> None:
    """Announce two different lengths."""
    x.start("Content-Length: 7", length=len(x.body))
    x.send(x.body)


@rude
def length_of_20_digits(x: Exchange) -> None:
    """Announce more than 64 bits can count."""
    x.start(length="9" * 20)
    x.send(x.body)


@rude
def length_of_5000_digits(x: Exchange) -> None:
    """Announce more digits than Python turns into a number."""
    x.start(length="9" * 5000)
    x.send(x.body)


@rude
def no_length(x: Exchange) -> None:
    """Announce nothing, send the right bytes and close: HTTP/1.0's way, and allowed."""
    x.start()
    x.send(x.body)


@rude
def no_length_and_cut(x: Exchange) -> None:
    """Announce nothing and close too early."""
    x.start()
    x.send(x.half)


# ------------------------------------------------------------------ ranges


@rude
def unasked_206(x: Exchange) -> None:
    """Send a part to whoever wants the whole."""
    x.start(f"Content-Range: bytes 0-9/{len(x.body)}", status="206 Partial Content", length=10)
    x.send(x.body[:10])


@rude
def unasked_416(x: Exchange) -> None:
    """Refuse a range that nobody asked for."""
    x.answer(b"", f"Content-Range: bytes */{len(x.body)}", status="416 Range Not Satisfiable")


@rude_when_resumed
def range_ignored(x: Exchange) -> None:
    """Answer 200 to whoever continues."""
    x.answer(x.body)


@rude_when_resumed
def range_refused(x: Exchange) -> None:
    """Answer 416 to whoever continues."""
    x.answer(b"", f"Content-Range: bytes */{len(x.body)}", status="416 Range Not Satisfiable")


@rude_when_resumed
def range_with_wrong_start(x: Exchange) -> None:
    """Send the right rest, and call it another one."""
    x.answer_part(f"bytes 5-{len(x.body) - 1}/{len(x.body)}")


@rude_when_resumed
def range_with_wrong_end(x: Exchange) -> None:
    """Announce a rest that ends before the file does."""
    x.answer_part(f"bytes {x.offset}-{len(x.body) - 5}/{len(x.body)}")


@rude_when_resumed
def range_with_wrong_total(x: Exchange) -> None:
    """Speak of a file of another size."""
    x.answer_part(f"bytes {x.offset}-{len(x.body) - 1}/{len(x.body) + 7}")


@rude_when_resumed
def range_without_content_range(x: Exchange) -> None:
    """Do not say which part it is."""
    x.answer_part(None)


@rude_when_resumed
def range_in_other_unit(x: Exchange) -> None:
    """Count in another unit."""
    x.answer_part(f"chapters {x.offset}-{len(x.body) - 1}/{len(x.body)}")


@rude_when_resumed
def range_that_is_junk(x: Exchange) -> None:
    """Write a Content-Range that nobody can read."""
    x.answer_part("bytes 0x3-four/*")


@rude_when_resumed
def range_as_multipart(x: Exchange) -> None:
    """Wrap the part into a multipart body."""
    part = f"--x\r\nContent-Range: bytes {x.offset}-{len(x.body) - 1}/{len(x.body)}\r\n\r\n".encode()
    body = part + x.body[x.offset or 0 :] + b"\r\n--x--\r\n"
    x.answer(body, "Content-Type: multipart/byteranges; boundary=x", status="206 Partial Content")


@rude_when_resumed
def range_of_another_version(x: Exchange) -> None:
    """Continue with the end of another file, under its own ETag."""
    rest = flipped(x.body)[x.offset or 0 :]
    content_range = f"Content-Range: bytes {x.offset}-{len(x.body) - 1}/{len(x.body)}"
    x.start(content_range, status="206 Partial Content", length=len(rest), tag='"another version"')
    x.send(rest)


@rude_when_resumed
def range_cut_again(x: Exchange) -> None:
    """Cut the rest in its middle, too."""
    rest = x.body[x.offset or 0 :]
    x.start(
        f"Content-Range: bytes {x.offset}-{len(x.body) - 1}/{len(x.body)}",
        status="206 Partial Content",
        length=len(rest),
    )
    x.send(rest[: len(rest) // 2])


@rude_when_resumed
def range_with_wrong_bytes(x: Exchange) -> None:
    """Continue with wrong bytes under the right ETag."""
    rest = x.body[x.offset or 0 :]
    content_range = f"Content-Range: bytes {x.offset}-{len(x.body) - 1}/{len(x.body)}"
    x.answer(flipped(rest), content_range, status="206 Partial Content")


@rude
def weak_tag(x: Exchange) -> None:
    """Cut the first answer, under a tag that does not promise the same bytes."""
    x.start(length=len(x.body), tag=f"W/{x.tag}")
    x.send(x.half if x.number == 1 else x.body)


# ------------------------------------------------------------------ encodings


@rude
def gzip_encoded(x: Exchange) -> None:
    """Send the right bytes compressed, which nobody asked for."""
    x.answer(gzip.compress(x.body), "Content-Encoding: gzip")


@rude
def gzip_bomb(x: Exchange) -> None:
    """Send 64 KiB that would become 64 MiB."""
    x.answer(gzip.compress(bytes(1 << 20)) * 64, "Content-Encoding: gzip")


@rude
def deflate_announced(x: Exchange) -> None:
    """Send the right bytes under a wrong Content-Encoding."""
    x.answer(x.body, "Content-Encoding: deflate")


@rude
def unknown_transfer_encoding(x: Exchange) -> None:
    """Use a transfer coding that nobody offered to take."""
    x.start("Transfer-Encoding: gzip")
    x.send(gzip.compress(x.body))


@rude
def length_and_chunked(x: Exchange) -> None:
    """Frame the body twice, differently: what request smuggling is made of."""
    x.start("Transfer-Encoding: chunked", length=5)
    x.chunk(x.body)
    x.send(b"0\r\n\r\n")


# ------------------------------------------------------------------ redirects


@rude
def redirect_loop(x: Exchange) -> None:
    """Send the client back to where it is."""
    x.answer(b"", f"Location: {x.request.target if x.request else ''}", status="302 Found")


@rude
def redirect_to_other_host(x: Exchange) -> None:
    """Send the client to another host, which has the right bytes."""
    target = x.request.target if x.request else ""
    x.answer(
        b"", f"Location: http://localhost:{x.origin.port}{target}?elsewhere", status="307 Temporary Redirect"
    )


@rude
def redirect_to_file(x: Exchange) -> None:
    """Send the client to its own disk."""
    x.answer(b"", "Location: file:///etc/passwd", status="301 Moved Permanently")


@rude
def redirect_to_metadata_address(x: Exchange) -> None:
    """Send the client to where clouds keep their secrets."""
    x.answer(b"", "Location: http://169.254.169.254/latest/meta-data/", status="308 Permanent Redirect")


# ------------------------------------------------------------------ headers


@rude
def header_flood(x: Exchange) -> None:
    """Send 100,000 header lines."""
    x.send(b"HTTP/1.1 200 OK\r\n" + b"X-Flood: water\r\n" * 100_000 + b"\r\n")
    x.send(x.body)


@rude
def header_line_of_1_mib(x: Exchange) -> None:
    """Send one long header line."""
    x.start(f"X-Long: {'a' * (1 << 20)}", length=len(x.body))
    x.send(x.body)


@rude
def endless_header(x: Exchange) -> None:
    """Never end the header, at full speed."""
    x.send(b"HTTP/1.1 200 OK\r\nX-Endless: ")
    while True:
        x.send(b"a" * len(ZEROS))


@rude
def endless_continue(x: Exchange) -> None:
    """Tell the client to go on, for ever."""
    while True:
        x.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


@rude
def early_hints_flood(x: Exchange) -> None:
    """Send 10,000 interim answers, then the right one."""
    x.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 10_000)
    x.answer_well()


@rude
def header_absurd_but_legal(x: Exchange) -> None:
    """Serve well under a header that few would write."""
    many = "".join(f"X-{number}: {number}\r\n" for number in range(60))
    x.send(
        f"HTTP/1.1 200 \r\nCONTENT-LENGTH:{len(x.body)}   \r\neTaG:\t{x.tag}\r\n{many}"
        f"X-Empty:\r\nX-Binary: \xff\xfe\r\nCoNnEcTiOn: close, x\r\n\r\n".encode("latin-1")
    )
    x.send(x.body)


@rude
def header_folded(x: Exchange) -> None:
    """Serve well under a header that is folded as it was once allowed."""
    x.start("X-Folded: one\r\n two\r\n\tthree", length=len(x.body))
    x.send(x.body)


@rude
def header_in_small_pieces(x: Exchange) -> None:
    """Serve well, with every byte of the header in a packet of its own."""
    for byte in f"HTTP/1.1 200 OK\r\nContent-Length: {len(x.body)}\r\n\r\n".encode():
        x.send(bytes([byte]))
    x.send(x.body)


@rude
def header_with_nul(x: Exchange) -> None:
    """Put control characters into the header, of a body that is right."""
    x.start("X-Odd: a\0b\x1b[31m", length=len(x.body))
    x.send(x.body)


# ------------------------------------------------------------------ no HTTP


@rude
def garbage(x: Exchange) -> None:
    """Answer with what is no HTTP."""
    x.send(bytes(range(128, 256)) * 20 + b"\r\n\r\n")


@rude
def endless_garbage(x: Exchange) -> None:
    """Answer with no HTTP, and no line's end either."""
    while True:
        x.send(b"\xfe" * len(ZEROS))


@rude
def http_0_9(x: Exchange) -> None:
    """Send the body and nothing else."""
    x.send(x.body)


@rude
def http_2_preface(x: Exchange) -> None:
    """Answer in HTTP/2: an empty SETTINGS frame."""
    x.send(b"\0\0\0\x04\0\0\0\0\0")


@rude
def http_9_status_line(x: Exchange) -> None:
    """Claim a version and a status that there are not."""
    x.send(b"HTTP/9.9 99999 Never\r\n\r\n")


@rude
def empty_reply(x: Exchange) -> None:
    """Read the request and close."""


@rude_at_once
def closes_on_accept(x: Exchange) -> None:
    """Close at once."""


@rude_at_once
def tls_on_a_plain_port(x: Exchange) -> None:
    """Send a TLS alert."""
    x.send(b"\x15\x03\x03\x00\x02\x02\x46")
    x.stall()


# ------------------------------------------------------------------ resets


@rude
def reset_before_answer(x: Exchange) -> None:
    """Break off before the status line."""
    x.reset()


@rude
def reset_in_header(x: Exchange) -> None:
    """Break off in the header."""
    x.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    x.reset()


@rude
def reset_in_body(x: Exchange) -> None:
    """Break off in the middle of the body."""
    x.start(length=len(x.body))
    x.send(x.half)
    x.reset()


@rude
def closed_when_idle(x: Exchange) -> None:
    """Promise to keep the connection, answer well, and close it."""
    x.start("Connection: keep-alive", length=len(x.body))
    x.send(x.body)


def rude_on_kept_connections(act: Misbehaviour) -> Misbehaviour:
    """Serve the first request of each connection well, and let `act` answer every other."""

    def answer(x: Exchange) -> None:
        if x.is_first_of_connection:
            x.answer_well()
        else:
            act(x)

    ON_REQUEST[act.__name__] = answer
    return act


@rude_on_kept_connections
def late_endless_rest(x: Exchange) -> None:
    """Never stop once the next request comes."""
    while True:
        x.send(ZEROS)


@rude_on_kept_connections
def late_garbage(x: Exchange) -> None:
    """Send a few bytes that are no answer."""
    x.send(b"rest of a body\r\n\r\n")


@rude_on_kept_connections
def late_reset_in_header(x: Exchange) -> None:
    """Break off in the header."""
    reset_in_header(x)


# ------------------------------------------------------------------ chunks


@rude
def chunks_that_are_legal(x: Exchange) -> None:
    """Serve well in chunks with extensions, upper case, leading zeros and a trailer."""
    x.start("Transfer-Encoding: chunked")
    for start in range(0, len(x.body), 4097):
        piece = x.body[start : start + 4097]
        x.send(b"00%X;note=odd\r\n%s\r\n" % (len(piece), piece))
    x.send(b"0\r\nX-Trailer: yes\r\n\r\n")


@rude
def chunk_cut(x: Exchange) -> None:
    """Close in the middle of a chunk."""
    x.start("Transfer-Encoding: chunked")
    x.send(b"%x\r\n" % len(x.body), x.half)


@rude
def chunks_without_last(x: Exchange) -> None:
    """Send every byte, and not the chunk that ends the body."""
    x.start("Transfer-Encoding: chunked")
    x.chunk(x.body)


@rude
def chunk_size_is_junk(x: Exchange) -> None:
    """Write a chunk size that is no number."""
    x.start("Transfer-Encoding: chunked")
    x.send(b"zebra\r\n", x.body, b"\r\n0\r\n\r\n")


@rude
def chunk_size_negative(x: Exchange) -> None:
    """Write a negative chunk size."""
    x.start("Transfer-Encoding: chunked")
    x.send(b"-5\r\n", x.body, b"\r\n0\r\n\r\n")


@rude
def chunk_size_huge(x: Exchange) -> None:
    """Announce a chunk of 16 exbibytes, and send the body for ever."""
    x.start("Transfer-Encoding: chunked")
    x.send(b"ffffffffffffffff\r\n")
    while True:
        x.send(ZEROS)


@rude
def chunk_extension_flood(x: Exchange) -> None:
    """Never end the line of a chunk's size."""
    x.start("Transfer-Encoding: chunked")
    x.send(b"5;")
    while True:
        x.send(b"a" * len(ZEROS))


@rude
def chunks_of_nothing(x: Exchange) -> None:
    """Send a byte in a chunk, each with a long extension: traffic without progress."""
    x.start("Transfer-Encoding: chunked")
    for byte in x.body:
        x.send(b"1;%s\r\n%c\r\n" % (b"a" * 60_000, byte))
    x.send(b"0\r\n\r\n")


@rude
def endless_trailers(x: Exchange) -> None:
    """Send the right bytes, and then trailers for ever."""
    x.start("Transfer-Encoding: chunked")
    x.chunk(x.body)
    x.send(b"0\r\n")
    while True:
        x.send(b"X-Trailer: water\r\n" * 1000)


# ------------------------------------------------------------------ statuses


def _status(
    name: str, status: str, *lines: str, body: bytes = b"sorry\n", bad_requests: int = 1 << 30
) -> None:
    """Put into the table: the first requests for a path get this status, the others are served well."""

    def act(x: Exchange) -> None:
        if x.number > bad_requests:
            x.answer_well()
        else:
            x.answer(body, *lines, status=status)

    ON_REQUEST[name] = act


_status("status_500_twice", "500 Internal Server Error", bad_requests=2)
_status("status_500", "500 Internal Server Error")
_status("status_503_retry_after_1", "503 Service Unavailable", "Retry-After: 1", bad_requests=1)
_status("status_503_retry_after_3600", "503 Service Unavailable", "Retry-After: 3600")
_status("status_503_retry_after_junk", "503 Service Unavailable", "Retry-After: soon\x01", bad_requests=1)
_status(
    "status_503_retry_after_date",
    "503 Service Unavailable",
    f"Retry-After: {formatdate(usegmt=True)}",
    bad_requests=1,
)
_status("status_429", "429 Too Many Requests", bad_requests=1)
_status("status_404", "404 Not Found")
_status("status_401", "401 Unauthorized", 'WWW-Authenticate: Basic realm="x"')
_status("status_204", "204 No Content", body=b"")
_status("status_304", "304 Not Modified", body=b"")
_status("status_101", "101 Switching Protocols", "Upgrade: websocket", body=b"")
_status("html_200", "200 OK", "Content-Type: text/html", body=b"<html><title>Please log in</title></html>")
_status("empty_200", "200 OK", body=b"")
_status("error_body_of_1_mib", "404 Not Found", body=bytes(1 << 20))
