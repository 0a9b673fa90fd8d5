//! Canonical JSON: one pass over the raw bytes.
//!
//! <https://spec.matrix.org/v1.18/appendices/#canonical-json>

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ops::Range;

use serde_json::Value;
use smallvec::SmallVec;

/// Integers stay within ±(2^53 − 1).
pub const INTEGER_MAX: i64 = (1 << 53) - 1;

/// Deeper values are refused. serde_json reads 127 levels; the rest is room for envelopes around events.
pub const DEPTH_MAX: usize = 120;

/// Of an integer in the lenient form, so that it can still be read as a double.
const LENIENT_DIGITS_MAX: usize = 300;

/// Members of an object that are sorted without asking for memory.
const MEMBERS_INLINE: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    #[error("not JSON (at byte {0})")]
    Syntax(usize),
    #[error("not UTF-8")]
    Utf8,
    #[error("half of a surrogate pair (at byte {0})")]
    Surrogate(usize),
    #[error("a number that is not an integer between -(2^53 - 1) and 2^53 - 1 (at byte {0})")]
    Number(usize),
    #[error("a key stands twice in an object (before byte {0})")]
    DuplicateKey(usize),
    #[error("more than {DEPTH_MAX} levels deep")]
    Depth,
    #[error("not an object")]
    NotAnObject,
}

/// Rewrites one JSON value in its canonical form.
///
/// Strict is what room versions 6 and later demand. Lenient is for the versions before: floats are
/// written as Python's `repr` does, which is what the hashes of such events were made from; integers of
/// any size stay as they are; the last of equal keys wins.
pub fn canonicalise(raw: &[u8], strict: bool) -> Result<Vec<u8>, JsonError> {
    let raw = std::str::from_utf8(raw).map_err(|_| JsonError::Utf8)?;
    canonicalise_str(raw, strict).map(String::into_bytes)
}

/// As [`canonicalise`], for what is known to be UTF-8.
pub fn canonicalise_str(raw: &str, strict: bool) -> Result<String, JsonError> {
    let mut pass = Pass::new(raw, strict);
    pass.space();
    pass.value(1)?;
    pass.end()?;
    Ok(pass.out)
}

/// The canonical form of a value made here. Strict.
pub fn to_canonical(value: &Value) -> Result<String, JsonError> {
    canonicalise_str(&value.to_string(), true)
}

/// As [`to_canonical`], in the lenient form for room versions 1 to 5.
pub fn to_canonical_lenient(value: &Value) -> Result<String, JsonError> {
    canonicalise_str(&value.to_string(), false)
}

/// A canonical object and where its members stand, sorted by key.
pub(crate) struct Object {
    pub text: String,
    pub members: Vec<Member>,
}

/// Offsets of one member `"key":value` in the text of its object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    start: usize,
    /// Where the value begins; the closing quote of the key is two bytes before.
    value: usize,
    end: usize,
}

impl Member {
    /// The key as it stands between its quotes, escapes and all.
    pub fn key(self, text: &str) -> &str {
        &text[self.start + 1..self.value - 2]
    }

    pub fn value(self, text: &str) -> &str {
        &text[self.value..self.end]
    }

    pub fn start(self) -> usize {
        self.start
    }

    pub fn end(self) -> usize {
        self.end
    }

    /// `"key":value`
    pub fn whole(self, text: &str) -> &str {
        &text[self.start..self.end]
    }
}

impl Object {
    pub fn parse(raw: &str, strict: bool) -> Result<Self, JsonError> {
        let mut pass = Pass::new(raw, strict);
        pass.space();
        if pass.peek() != Some(b'{') {
            return match pass.value(1).and_then(|()| pass.end()) {
                Ok(()) => Err(JsonError::NotAnObject),
                Err(error) => Err(error),
            };
        }
        pass.at += 1;
        pass.object(1)?;
        let members = std::mem::take(&mut pass.members);
        pass.end()?;
        Ok(Self {
            text: pass.out,
            members,
        })
    }

    /// Takes a text that is canonical already.
    pub fn index(text: String) -> Self {
        let members = members(&text).collect();
        Self { text, members }
    }

    /// Takes a member out. For keys that need no escape.
    pub fn remove(&mut self, key: &str) {
        let Some(at) = self
            .members
            .iter()
            .position(|member| member.key(&self.text) == key)
        else {
            return;
        };
        let Member { start, end, .. } = self.members.remove(at);
        // A comma goes with it: the one behind, or before the last member the one in front.
        let gap = match (at < self.members.len(), at > 0) {
            (true, _) => start..end + 1,
            (false, true) => start - 1..end,
            (false, false) => start..end,
        };
        for member in &mut self.members[at..] {
            member.start -= gap.len();
            member.value -= gap.len();
            member.end -= gap.len();
        }
        self.text.drain(gap);
    }

    /// The value of a key that needs no escape.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.span(key).map(|span| &self.text[span])
    }

    /// Where in `text` that value stands.
    pub fn span(&self, key: &str) -> Option<Range<usize>> {
        let mut members = self.members.iter();
        let member = members.find(|member| member.key(&self.text) == key)?;
        Some(member.value..member.end)
    }
}

/// The values of these keys in a canonical object, in one pass. For keys that need no escape.
pub fn pick<'a, const N: usize>(object: &'a str, keys: [&str; N]) -> [Option<&'a str>; N] {
    let mut found = [None; N];
    for member in members(object) {
        if let Some(at) = keys.iter().position(|key| member.key(object) == *key) {
            found[at] = Some(member.value(object));
        }
    }
    found
}

/// The members of a canonical object, in order. The text comes from a pass above, here or when it was
/// stored; should it be no object after all, this ends early.
pub(crate) fn members(text: &str) -> impl Iterator<Item = Member> {
    let bytes = text.as_bytes();
    // At the `{` or at a comma.
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + 1;
        if !matches!(bytes.get(at)?, b'{' | b',') || *bytes.get(start)? != b'"' {
            return None;
        }
        let colon = end_of_string(bytes, start)?;
        if *bytes.get(colon)? != b':' {
            return None;
        }
        let value = colon + 1;
        at = end_of_value(bytes, value)?;
        Some(Member {
            start,
            value,
            end: at,
        })
    })
}

/// The value of a key that needs no escape, in a canonical object.
pub(crate) fn get<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    members(text)
        .find(|member| member.key(text) == key)
        .map(|member| member.value(text))
}

/// The elements of a canonical array; `None` for any other value.
pub(crate) fn elements(text: &str) -> Option<impl Iterator<Item = &str>> {
    let bytes = text.as_bytes();
    if bytes.first() != Some(&b'[') {
        return None;
    }
    // At the `[` or at a comma; the last element is followed by the `]`.
    let mut at = 0;
    Some(std::iter::from_fn(move || {
        let start = at + 1;
        if !matches!(bytes.get(at)?, b'[' | b',') || *bytes.get(start)? == b']' {
            return None;
        }
        at = end_of_value(bytes, start)?;
        Some(&text[start..at])
    }))
}

/// The position after the string that begins at `at`.
fn end_of_string(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += 1;
        at += memchr::memchr2(b'"', b'\\', bytes.get(at..)?)?;
        if bytes[at] == b'"' {
            return Some(at + 1);
        }
        at += 1;
    }
}

/// The position after the value that begins at `at`.
fn end_of_value(bytes: &[u8], mut at: usize) -> Option<usize> {
    let mut open = 0_usize;
    loop {
        match bytes.get(at)? {
            b'"' => at = end_of_string(bytes, at)?,
            b'{' | b'[' => {
                open += 1;
                at += 1;
            }
            b'}' | b']' => {
                open = open.checked_sub(1)?;
                at += 1;
            }
            _ if open > 0 => {
                at += 1;
                continue;
            }
            _ => {
                while !matches!(bytes.get(at)?, b',' | b'}' | b']') {
                    at += 1;
                }
            }
        }
        if open == 0 {
            return Some(at);
        }
    }
}

/// The characters of a canonical string with its quotes; `None` for any other value.
pub(crate) fn string(value: &str) -> Option<Cow<'_, str>> {
    let inner = value.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Some(Cow::Borrowed(inner));
    }
    serde_json::from_str::<String>(value).ok().map(Cow::Owned)
}

enum Escape {
    Short(u8),
    Hex([u8; 2]),
}

fn escape_of(byte: u8) -> Option<Escape> {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    Some(match byte {
        b'"' | b'\\' => Escape::Short(byte),
        0x08 => Escape::Short(b'b'),
        b'\t' => Escape::Short(b't'),
        b'\n' => Escape::Short(b'n'),
        0x0c => Escape::Short(b'f'),
        b'\r' => Escape::Short(b'r'),
        0..0x20 => Escape::Hex([HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]),
        _ => return None,
    })
}

struct Pass<'a> {
    raw: &'a str,
    at: usize,
    strict: bool,
    out: String,
    /// The members of the objects that are open, innermost last.
    members: Vec<Member>,
    spare: String,
}

impl<'a> Pass<'a> {
    fn new(raw: &'a str, strict: bool) -> Self {
        Self {
            raw,
            at: 0,
            strict,
            out: String::with_capacity(raw.len()),
            members: Vec::with_capacity(32),
            spare: String::new(),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.raw.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.raw.as_bytes()[self.at..]
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn syntax<T>(&self) -> Result<T, JsonError> {
        Err(JsonError::Syntax(self.at))
    }

    fn end(&mut self) -> Result<(), JsonError> {
        self.space();
        if self.at == self.raw.len() {
            return Ok(());
        }
        self.syntax()
    }

    /// Stands at the first byte of a value, leaves after its last.
    fn value(&mut self, depth: usize) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.string().map(|_| ())
            }
            Some(b'{') => {
                let base = self.members.len();
                self.at += 1;
                self.object(depth)?;
                self.members.truncate(base);
                Ok(())
            }
            Some(b'[') => {
                self.at += 1;
                self.array(depth)
            }
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.word("true"),
            Some(b'f') => self.word("false"),
            Some(b'n') => self.word("null"),
            _ => self.syntax(),
        }
    }

    fn word(&mut self, word: &str) -> Result<(), JsonError> {
        if !self.rest().starts_with(word.as_bytes()) {
            return self.syntax();
        }
        self.at += word.len();
        self.out.push_str(word);
        Ok(())
    }

    /// After the `[`.
    fn array(&mut self, depth: usize) -> Result<(), JsonError> {
        if depth > DEPTH_MAX {
            return Err(JsonError::Depth);
        }
        self.out.push('[');
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            self.out.push(']');
            return Ok(());
        }
        loop {
            self.space();
            self.value(depth + 1)?;
            self.space();
            match self.peek() {
                Some(b',') => self.out.push(','),
                Some(b']') => {
                    self.at += 1;
                    self.out.push(']');
                    return Ok(());
                }
                _ => return self.syntax(),
            }
            self.at += 1;
        }
    }

    /// After the `{`. Leaves the object's members at the end of `self.members`.
    fn object(&mut self, depth: usize) -> Result<(), JsonError> {
        if depth > DEPTH_MAX {
            return Err(JsonError::Depth);
        }
        let base = self.members.len();
        self.out.push('{');
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            self.out.push('}');
            return Ok(());
        }
        let mut sorted = true;
        let mut escapes = false;
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return self.syntax();
            }
            self.at += 1;
            let start = self.out.len();
            escapes |= self.string()?;
            self.space();
            if self.peek() != Some(b':') {
                return self.syntax();
            }
            self.at += 1;
            self.out.push(':');
            let member = Member {
                start,
                value: self.out.len(),
                end: 0,
            };
            if sorted && self.members.len() > base {
                let last = self.members[self.members.len() - 1];
                sorted = compare_keys(&self.out, last, member, escapes) == Ordering::Less;
            }
            self.space();
            self.value(depth + 1)?;
            self.members.push(Member {
                end: self.out.len(),
                ..member
            });
            self.space();
            match self.peek() {
                Some(b',') => self.out.push(','),
                Some(b'}') => break,
                _ => return self.syntax(),
            }
            self.at += 1;
        }
        self.at += 1;
        if !sorted {
            self.sort(base, escapes)?;
        }
        self.out.push('}');
        Ok(())
    }

    /// Brings the members from `base` on in order, and their text in `out`.
    fn sort(&mut self, base: usize, escapes: bool) -> Result<(), JsonError> {
        let out = &self.out;
        let begin = self.members[base].start;
        let mut found: SmallVec<[(u64, Member); MEMBERS_INLINE]> = self
            .members
            .drain(base..)
            .map(|member| (rank(out, member, escapes), member))
            .collect();
        let compare = |a: &(u64, Member), b: &(u64, Member)| {
            let by_rank = a.0.cmp(&b.0);
            by_rank.then_with(|| compare_keys(out, a.1, b.1, escapes))
        };
        // Of equal keys the last is to be the last.
        found.sort_unstable_by(|a, b| compare(a, b).then(a.1.start.cmp(&b.1.start)));
        let mut kept = 0;
        for next in 1..found.len() {
            if compare(&found[kept], &found[next]) == Ordering::Equal {
                if self.strict {
                    return Err(JsonError::DuplicateKey(self.at));
                }
            } else {
                kept += 1;
            }
            found[kept] = found[next];
        }
        found.truncate(kept + 1);
        self.spare.clear();
        for (_, member) in found {
            let start = begin + self.spare.len();
            self.spare.push_str(member.whole(&self.out));
            self.spare.push(',');
            self.members.push(Member {
                start,
                value: start + (member.value - member.start),
                end: start + (member.end - member.start),
            });
        }
        self.spare.pop();
        self.out.truncate(begin);
        self.out.push_str(&self.spare);
        Ok(())
    }

    /// After the opening quote; leaves after the closing one. Whether an escape was written.
    fn string(&mut self) -> Result<bool, JsonError> {
        self.out.push('"');
        let mut escapes = false;
        loop {
            let from = self.at;
            while let Some(word) = self.rest().first_chunk() {
                let plain = plain_bytes(u64::from_le_bytes(*word));
                self.at += plain;
                if plain < 8 {
                    break;
                }
            }
            while self.peek().is_some_and(is_plain) {
                self.at += 1;
            }
            self.out.push_str(&self.raw[from..self.at]);
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    self.out.push('"');
                    return Ok(escapes);
                }
                Some(b'\\') => {
                    self.at += 1;
                    escapes |= self.escape()?;
                }
                _ => return self.syntax(),
            }
        }
    }

    /// After a backslash. Whether an escape was written, not the character itself.
    fn escape(&mut self) -> Result<bool, JsonError> {
        let letter = self.peek();
        self.at += 1;
        let character = match letter {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => self.unicode_escape()?,
            _ => {
                self.at -= 1;
                return self.syntax();
            }
        };
        let escape = u8::try_from(u32::from(character)).ok().and_then(escape_of);
        match &escape {
            Some(Escape::Short(letter)) => {
                self.out.push('\\');
                self.out.push(char::from(*letter));
            }
            Some(Escape::Hex(digits)) => {
                self.out.push_str("\\u00");
                self.out.extend(digits.map(char::from));
            }
            None => self.out.push(character),
        }
        Ok(escape.is_some())
    }

    /// After `\u`.
    fn unicode_escape(&mut self) -> Result<char, JsonError> {
        let start = self.at;
        let first = self.four_digits()?;
        if let Some(character) = char::from_u32(first) {
            return Ok(character);
        }
        // Half a pair: only a high half directly before a low half stands for something.
        if first >= 0xdc00 || !self.rest().starts_with(b"\\u") {
            return Err(JsonError::Surrogate(start));
        }
        self.at += 2;
        let second = self.four_digits()?;
        if !(0xdc00..0xe000).contains(&second) {
            return Err(JsonError::Surrogate(start));
        }
        char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00))
            .ok_or(JsonError::Surrogate(start))
    }

    fn four_digits(&mut self) -> Result<u32, JsonError> {
        let Some(digits) = self.rest().first_chunk::<4>() else {
            return self.syntax();
        };
        let mut value = 0;
        for &digit in digits {
            let Some(digit) = char::from(digit).to_digit(16) else {
                return self.syntax();
            };
            value = value * 16 + digit;
        }
        self.at += 4;
        Ok(value)
    }

    fn digits(&mut self) -> usize {
        let from = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        self.at - from
    }

    fn number(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        let negative = self.peek() == Some(b'-');
        if negative {
            self.at += 1;
        }
        let first = self.at;
        let count = self.digits();
        let zero = self.raw[first..].starts_with('0');
        if count == 0 || (count > 1 && zero) {
            return self.syntax();
        }
        let whole = self.at;
        let mut fraction = false;
        if self.peek() == Some(b'.') {
            fraction = true;
            self.at += 1;
            if self.digits() == 0 {
                return self.syntax();
            }
        }
        let mut exponent = false;
        if let Some(b'e' | b'E') = self.peek() {
            exponent = true;
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            if self.digits() == 0 {
                return self.syntax();
            }
        }
        if fraction || exponent {
            return self.float(start, fraction);
        }
        if self.strict {
            // 2^53 - 1 has 16 digits; more than 17 are not looked at.
            let magnitude = self.raw[first..whole]
                .bytes()
                .take(17)
                .fold(0_u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
            if count > 16 || magnitude > INTEGER_MAX.unsigned_abs() || (negative && zero) {
                return Err(JsonError::Number(start));
            }
        }
        if count > LENIENT_DIGITS_MAX {
            return Err(JsonError::Number(start));
        }
        let from = if zero { first } else { start };
        self.out.push_str(&self.raw[from..whole]);
        Ok(())
    }

    fn float(&mut self, start: usize, fraction: bool) -> Result<(), JsonError> {
        let number = match self.raw[start..self.at].parse::<f64>() {
            Ok(number) if number.is_finite() && !self.strict => number,
            _ => return Err(JsonError::Number(start)),
        };
        #[expect(clippy::cast_precision_loss, reason = "2^53 - 1 is exact in a double")]
        let safe = INTEGER_MAX as f64;
        if !fraction && number.trunc() == number && number.abs() <= safe {
            // The specification's own example turns 1e10 into an integer.
            self.out.push_str(&(number + 0.0).to_string());
            return Ok(());
        }
        self.out.push_str(&python_repr(number));
        Ok(())
    }
}

/// The shortest text that reads back as this number, laid out as Python does.
fn python_repr(number: f64) -> String {
    let text = format!("{number:e}");
    let Some((mantissa, exponent)) = text.split_once('e') else {
        return text;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{number:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

/// Whether a byte of a string stands for itself, in the input as in the output.
fn is_plain(byte: u8) -> bool {
    byte >= 0x20 && byte != b'"' && byte != b'\\'
}

/// How many of eight bytes do, before the first that does not.
fn plain_bytes(word: u64) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // The high bit of each byte of `x - n` that borrowed, for bytes below 0x80. A byte may have had to lend to
    // the one before, but then that one is found first.
    let below = |x: u64, n: u64| x.wrapping_sub(ONES * n) & !x;
    let quote = word ^ (ONES * u64::from(b'"'));
    let backslash = word ^ (ONES * u64::from(b'\\'));
    let found = (below(word, 0x20) | below(quote, 1) | below(backslash, 1)) & (ONES << 7);
    found.trailing_zeros() as usize / 8
}

/// The first eight bytes of a key, as a number that sorts as they do. Keys of equal rank may yet differ.
fn rank(out: &str, member: Member, escapes: bool) -> u64 {
    // What stands there sorts otherwise than what it stands for.
    if escapes {
        return 0;
    }
    let key = member.key(out).as_bytes();
    match key.first_chunk() {
        Some(first) => u64::from_be_bytes(*first),
        None => {
            let number = key.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            // No key has a byte 0 in it.
            number << (8 * (8 - key.len()).min(7))
        }
    }
}

/// By code point, which is by byte of the unescaped UTF-8.
fn compare_keys(out: &str, a: Member, b: Member, escapes: bool) -> Ordering {
    let (a, b) = (a.key(out).as_bytes(), b.key(out).as_bytes());
    if escapes {
        return unescaped(a).cmp(unescaped(b));
    }
    a.cmp(b)
}

/// The bytes that a canonical key stands for.
fn unescaped(key: &[u8]) -> impl Iterator<Item = u8> {
    let mut rest = key.iter().copied();
    std::iter::from_fn(move || {
        let byte = rest.next()?;
        if byte != b'\\' {
            return Some(byte);
        }
        Some(match rest.next()? {
            b'b' => 0x08,
            b't' => b'\t',
            b'n' => b'\n',
            b'f' => 0x0c,
            b'r' => b'\r',
            b'u' => {
                // Always `00` and two digits.
                let digits = [rest.nth(2)?, rest.next()?];
                digits.iter().fold(0, |sum, digit| {
                    let digit = (*digit as char).to_digit(16).unwrap_or(0);
                    sum << 4 | u8::try_from(digit).unwrap_or(0)
                })
            }
            other => other,
        })
    })
}
