//! A variable's value in a stored request: as text, since it is only shown. Lists of numbers, one a
//! byte, are what older records hold.

use serde::{Deserialize, Deserializer, Serializer};

pub(crate) fn serialize<S: Serializer>(value: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(value))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stored {
        Text(String),
        Bytes(Vec<u8>),
    }
    Ok(match Stored::deserialize(deserializer)? {
        Stored::Text(text) => text.into_bytes(),
        Stored::Bytes(bytes) => bytes,
    })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize as _;
    use serde_json::{Value, json};

    use crate::v1::KeyValue;

    #[test]
    fn a_value_is_stored_as_text() {
        let of = |value: &[u8]| {
            serde_json::to_value(KeyValue { key: "A".into(), value: value.into() }).unwrap()
        };
        assert_eq!(of(b"good day"), json!({ "key": "A", "value": "good day" }));
        assert_eq!(of(b"x\xff"), json!({ "key": "A", "value": "x\u{fffd}" }));
    }

    #[test]
    fn text_and_the_numbers_of_older_records_are_read() {
        let read = |value: Value| {
            serde_json::from_value::<KeyValue>(json!({ "key": "A", "value": value }))
        };
        let numbers = b"good day\xff".to_vec();
        assert_eq!(read(json!(numbers)).unwrap().value, numbers);
        // As a request is read out of a record.
        let stored = json!({ "key": "A", "value": "good day" });
        assert_eq!(KeyValue::deserialize(&stored).unwrap().value, b"good day");
        assert_eq!(read(json!("good day")).unwrap().value, b"good day");
        assert_eq!(read(json!([])).unwrap().value, b"");
        assert!(read(json!([256])).is_err());
        let none = KeyValue::deserialize(&json!({ "key": "A" })).unwrap();
        assert_eq!(none.value, b"");
    }
}
