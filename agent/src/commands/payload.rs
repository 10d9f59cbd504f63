//! Binary data in arguments and results: base64.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use protocol::Error;

const ENGINE: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

pub(super) fn encode(data: &[u8]) -> String {
    ENGINE.encode(data)
}

/// Decodes as the reference does: newlines are skipped, and a last group of less than four
/// characters is ignored.
pub(super) fn decode(text: String) -> Result<Vec<u8>, Error> {
    let mut text = text.into_bytes();
    text.retain(|&byte| byte != b'\n');
    let invalid = || Error::generic("Base64 data contains invalid characters");
    if !text.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(byte)) {
        return Err(invalid());
    }
    text.truncate(text.len() / 4 * 4);
    ENGINE.decode(text).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_decoded_as_leniently_as_recorded() {
        let decoded = |text: &str| decode(text.into()).ok();
        assert_eq!(decoded("SGVsbG8gV29ybGQhCg=="), Some(b"Hello World!\n".to_vec()));
        assert_eq!(decoded("YWJj\n"), Some(b"abc".to_vec()));
        assert_eq!(decoded("YWJ"), Some(Vec::new()));
        assert_eq!(decoded(""), Some(Vec::new()));
        for bad in ["!!!", "@@@", "YW Jj", "YW=j", "é"] {
            assert_eq!(decoded(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_itself() {
        let bytes: Vec<u8> = (0..=255).collect();
        for length in 0..bytes.len() {
            assert_eq!(decode(encode(&bytes[..length])).unwrap(), &bytes[..length]);
        }
    }
}
