//! The header reader against damaged files and against the `safetensors` crate.

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::json;

use super::*;

/// A file of a header and this many bytes of data.
fn file(header: &Value, data_bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    bytes
}

fn entry(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

#[test]
fn a_sound_file_is_read() {
    let header = json!({"__metadata__": {"format": "pt"}, "a": entry("BF16", &[2, 3], 0, 12), "b": entry("F32", &[], 12, 16),
        "empty": entry("F32", &[0, 5], 16, 16)});
    let bytes = file(&header, 16);
    let tensors = parse("f", &bytes).unwrap();
    assert_eq!(tensors.len(), 3);
    assert_eq!(tensors["a"].shape, [2, 3]);
    assert_eq!(&bytes[tensors["b"].begin..tensors["b"].end], &[7; 4]);
}

#[test]
fn each_kind_of_damage_has_its_error() {
    use CheckpointError as E;
    type Expected = fn(&E) -> bool;
    let huge = 1u64 << 62;
    let cases: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("empty", vec![], |e| {
            matches!(
                e,
                E::HeaderTruncated {
                    needed: 8,
                    found: 0,
                    ..
                }
            )
        }),
        ("seven bytes", vec![0; 7], |e| {
            matches!(e, E::HeaderTruncated { .. })
        }),
        (
            "length over the file",
            [&100u64.to_le_bytes()[..], b"{}"].concat(),
            |e| {
                matches!(
                    e,
                    E::HeaderTruncated {
                        needed: 108,
                        found: 10,
                        ..
                    }
                )
            },
        ),
        (
            "length over the limit",
            u64::MAX.to_le_bytes().to_vec(),
            |e| matches!(e, E::HeaderTooLarge { .. }),
        ),
        ("no JSON", [&2u64.to_le_bytes()[..], b"{x"].concat(), |e| {
            matches!(e, E::HeaderSyntax { .. })
        }),
        (
            "no object",
            [&2u64.to_le_bytes()[..], b"[]"].concat(),
            |e| matches!(e, E::HeaderSyntax { .. }),
        ),
        (
            "no UTF-8",
            [&2u64.to_le_bytes()[..], b"\xff\xff"].concat(),
            |e| matches!(e, E::HeaderSyntax { .. }),
        ),
        (
            "entry no object",
            file(&json!({"a": 3}), 0),
            |e| matches!(e, E::Entry { tensor, .. } if tensor == "a"),
        ),
        (
            "unknown type",
            file(&json!({"a": entry("F31", &[1], 0, 4)}), 4),
            |e| matches!(e, E::Entry { .. }),
        ),
        (
            "negative shape",
            file(
                &json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
                4,
            ),
            |e| matches!(e, E::Entry { .. }),
        ),
        (
            "no offsets",
            file(&json!({"a": {"dtype": "F32", "shape": [1]}}), 4),
            |e| matches!(e, E::Entry { .. }),
        ),
        (
            "truncated",
            file(&json!({"a": entry("F32", &[2], 0, 8)}), 7),
            |e| {
                matches!(
                    e,
                    E::Outside {
                        end: 8,
                        found: 7,
                        ..
                    }
                )
            },
        ),
        (
            "backwards",
            file(&json!({"a": entry("F32", &[1], 4, 0)}), 4),
            |e| {
                matches!(
                    e,
                    E::Backwards {
                        begin: 4,
                        end: 0,
                        ..
                    }
                )
            },
        ),
        (
            "offsets near 2^64",
            file(&json!({"a": entry("F32", &[1], u64::MAX - 4, u64::MAX)}), 4),
            |e| matches!(e, E::Outside { .. }),
        ),
        (
            "wrong size",
            file(&json!({"a": entry("F32", &[2], 0, 4)}), 4),
            |e| matches!(e, E::Size { shape, bytes: 4, .. } if shape == &[2]),
        ),
        (
            "overflowing shape",
            file(&json!({"a": entry("F32", &[huge, 4], 0, 4)}), 4),
            |e| matches!(e, E::Size { .. }),
        ),
        (
            "overflowing bits",
            file(&json!({"a": entry("F32", &[huge], 0, 4)}), 4),
            |e| matches!(e, E::Size { .. }),
        ),
        (
            "product wraps to the size",
            file(&json!({"a": entry("F32", &[1 << 32, 1 << 32], 0, 0)}), 0),
            |e| matches!(e, E::Size { .. }),
        ),
        (
            "overlap",
            file(
                &json!({"a": entry("F32", &[2], 0, 8), "b": entry("F32", &[2], 4, 12)}),
                12,
            ),
            |e| matches!(e, E::Overlap { first, second, at: 4, .. } if first == "a" && second == "b"),
        ),
        (
            "same bytes",
            file(
                &json!({"a": entry("F32", &[1], 0, 4), "b": entry("F32", &[1], 0, 4)}),
                4,
            ),
            |e| matches!(e, E::Overlap { .. }),
        ),
        (
            "gap",
            file(
                &json!({"a": entry("F32", &[1], 0, 4), "b": entry("F32", &[1], 8, 12)}),
                12,
            ),
            |e| {
                matches!(
                    e,
                    E::Unclaimed {
                        begin: 4,
                        end: 8,
                        ..
                    }
                )
            },
        ),
        (
            "trailing bytes",
            file(&json!({"a": entry("F32", &[1], 0, 4)}), 5),
            |e| {
                matches!(
                    e,
                    E::Unclaimed {
                        begin: 4,
                        end: 5,
                        ..
                    }
                )
            },
        ),
    ];
    for (name, bytes, expected) in cases {
        let error = parse("model.safetensors", &bytes).expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
        assert!(
            error.to_string().contains("model.safetensors"),
            "{name}: {error}"
        );
    }
}

/// The sum of the tensors and the header overflows 64 bits: the crate's arithmetic panics here in a debug build.
#[test]
fn tensors_that_add_up_past_two_to_the_64_are_refused() {
    let each = (1u64 << 61) - 1;
    let mut header = serde_json::Map::new();
    for i in 0..8u64 {
        header.insert(
            i.to_string(),
            entry("U8", &[each], i * each, (i + 1) * each),
        );
    }
    assert!(matches!(
        parse("f", &file(&Value::Object(header), 8)),
        Err(CheckpointError::Outside { .. })
    ));
}

fn sound() -> Vec<u8> {
    file(
        &json!({"__metadata__": {"format": "pt"}, "model.norm.weight": entry("BF16", &[4], 0, 8), "b": entry("F32", &[2, 2], 8, 24),
            "c": entry("I64", &[1], 24, 32)}),
        32,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn damaged_bytes_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut: prop::sample::Index, cuts: bool
    ) {
        let mut bytes = sound();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        crate::fuzz::safetensors(&bytes);
    }

    /// Entries of any numbers, near the bounds and at them, agree with the crate about what is sound.
    #[test]
    fn entries_are_sound_to_us_if_and_only_if_to_the_crate(
        entries in prop::collection::vec((prop::sample::select(vec!["F32", "BF16", "U8", "F4", "F6_E2M3"]),
            prop::collection::vec(0u64..5, 0..3), 0u64..20, 0u64..20), 0..4),
        adjacent: bool, data_bytes in 0usize..24,
    ) {
        let mut header = serde_json::Map::new();
        let mut at = 0;
        for (i, (dtype, shape, begin, end)) in entries.iter().enumerate() {
            let (begin, end) = if adjacent {
                let bits = match *dtype { "F32" => 32, "BF16" => 16, "U8" => 8, "F4" => 4, _ => 6 };
                let begin = at;
                at += shape.iter().product::<u64>() * bits / 8;
                (begin, at)
            } else {
                (*begin, *end)
            };
            header.insert(i.to_string(), entry(dtype, shape, begin, end));
        }
        let data_bytes = if adjacent { at as usize } else { data_bytes };
        let bytes = file(&Value::Object(header), data_bytes);
        let ours = parse("f", &bytes);
        match (&ours, SafeTensors::deserialize(&bytes)) {
            (Ok(ours), Ok(theirs)) => {
                prop_assert_eq!(ours.len(), theirs.len());
                for (name, view) in theirs.iter() {
                    let stored = &ours[name];
                    prop_assert_eq!(&bytes[stored.begin..stored.end], view.data());
                    prop_assert_eq!(stored.shape.as_slice(), view.shape());
                }
            }
            (Err(_), Err(_)) => {}
            (ours, theirs) => prop_assert!(false, "{:?} against {:?}", ours, theirs.is_ok()),
        }
    }
}
