//! What the tests share: a seeded source of choices, and JSON written badly.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// SplitMix64: the same choices for the same seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.roll() % limit as u64).expect("below a usize")
    }

    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    pub fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.roll().to_le_bytes()[0])
    }

    pub fn text(&mut self) -> String {
        const PIECES: [&str; 16] = [
            "a", "b", "key", "\"", "\\", "\n", "\u{1}", "\u{1f}", "\u{7f}", "é", "Я", "日本", "🦀",
            "/", " ", "\u{ffff}",
        ];
        let pieces = self.below(5);
        (0..pieces).map(|_| self.pick(&PIECES)).collect()
    }

    /// A value that strict canonical JSON allows.
    pub fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 5 } else { 7 }) {
            0 => Value::Null,
            1 => json!(self.one_in(2)),
            2 => json!(i64::try_from(self.roll() >> 11).expect("53 bits")),
            3 => json!(-i64::try_from(self.roll() >> 40).expect("24 bits")),
            4 => json!(self.text()),
            5 => (0..self.below(4)).map(|_| self.value(depth - 1)).collect(),
            _ => Value::Object(self.object(depth - 1)),
        }
    }

    pub fn object(&mut self, depth: usize) -> Map<String, Value> {
        (0..self.below(6))
            .map(|_| (self.text(), self.value(depth)))
            .collect()
    }
}

/// Writes a value with needless space, needless escapes and keys in any order.
pub fn written_badly(value: &Value, dice: &mut Dice) -> String {
    let mut out = String::new();
    write_badly(value, dice, &mut out);
    out
}

fn write_badly(value: &Value, dice: &mut Dice, out: &mut String) {
    space(dice, out);
    match value {
        Value::String(text) => write_text(text, dice, out),
        Value::Array(list) => {
            out.push('[');
            for (at, item) in list.iter().enumerate() {
                out.push_str(if at > 0 { "," } else { "" });
                write_badly(item, dice, out);
            }
            space(dice, out);
            out.push(']');
        }
        Value::Object(map) => {
            let mut members: Vec<_> = map.iter().collect();
            for at in (1..members.len()).rev() {
                members.swap(at, dice.below(at + 1));
            }
            out.push('{');
            for (at, (key, item)) in members.into_iter().enumerate() {
                out.push_str(if at > 0 { "," } else { "" });
                space(dice, out);
                write_text(key, dice, out);
                space(dice, out);
                out.push(':');
                write_badly(item, dice, out);
            }
            space(dice, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
    space(dice, out);
}

fn space(dice: &mut Dice, out: &mut String) {
    if dice.one_in(4) {
        out.push_str(dice.pick(&[" ", "\n", "\t", "\r\n "]));
    }
}

fn write_text(text: &str, dice: &mut Dice, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        let must = matches!(character, '"' | '\\' | '\0'..='\u{1f}');
        if must || dice.one_in(8) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                if dice.one_in(2) {
                    write!(out, "\\u{unit:04x}").expect("a String takes all");
                } else {
                    write!(out, "\\u{unit:04X}").expect("a String takes all");
                }
            }
        } else {
            out.push(character);
        }
    }
    out.push('"');
}

/// Changes a few bytes of a text, or cuts it off.
pub fn mutated(text: &str, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = dice.below(bytes.len());
        match dice.below(5) {
            0 => bytes[at] = dice.bytes::<1>()[0],
            1 => {
                bytes[at] =
                    *dice.pick(&[b"{", b"}", b"[", b"]", b"\"", b"\\", b",", b":", b"0"])[..]
                        .first()
                        .expect("one byte")
            }
            2 => {
                bytes.remove(at);
            }
            3 => bytes.insert(
                at,
                *dice
                    .pick(&[b"\"", b"\\", b"{", b"-", b"e", b"."])
                    .first()
                    .expect("one byte"),
            ),
            _ => bytes.truncate(at),
        }
    }
    bytes
}
