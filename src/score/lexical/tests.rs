//! The embedded weights: agreement with the training script, and scores of unseen lines.

use super::*;

/// For each language a benign line, a line that mentions an identity, and two mild insults. None of
/// them is in the training text.
const LINES: [(&str, [&str; 2], [&str; 2]); 17] = [
    (
        "ar",
        ["ذهبنا إلى السوق واشترينا الخضار والفواكه", "صديقتي المسلمة تطبخ طعاما لذيذا في العيد"],
        ["أنت أحمق وغبي ولا أحد يحبك", "اخرس يا حيوان يا قذر"],
    ),
    (
        "cs",
        ["Zítra pojedeme vlakem k babičce na venkov", "Můj kamarád je gay a učí na základní škole"],
        ["Jsi blbý idiot a nikdo tě nemá rád", "Drž hubu, ty kreténe"],
    ),
    (
        "de",
        ["Morgen fahren wir mit dem Zug zu meiner Tante", "Meine muslimische Kollegin hat heute Geburtstag"],
        ["Du bist ein dummer Idiot und niemand mag dich", "Halt die Fresse, du Vollidiot"],
    ),
    (
        "en",
        [
            "We took the bus to the market and bought some apples",
            "My black friend teaches maths at the college",
        ],
        ["You are a stupid idiot and nobody likes you", "Shut up, you disgusting moron"],
    ),
    (
        "es",
        ["Mañana iremos en tren a casa de mi tía", "Mi amiga musulmana trabaja de enfermera en el hospital"],
        ["Eres un estúpido idiota y nadie te quiere", "Cállate, imbécil asqueroso"],
    ),
    (
        "fr",
        [
            "Demain nous prendrons le train pour aller chez ma tante",
            "Mon collègue juif joue du piano le samedi",
        ],
        ["Tu es un imbécile et personne ne t'aime, pauvre idiot", "Ferme ta gueule, espèce de crétin"],
    ),
    (
        "hi",
        ["कल हम ट्रेन से मौसी के घर जाएँगे", "मेरी मुस्लिम सहेली अस्पताल में नर्स है"],
        ["तू बेवकूफ और मूर्ख है, तुझे कोई पसंद नहीं करता", "चुप कर, कमीने गधे"],
    ),
    (
        "id",
        ["Besok kami naik kereta ke rumah bibi", "Teman saya yang Kristen mengajar di sekolah dasar"],
        ["Kamu idiot bodoh dan tidak ada yang suka kamu", "Diam kau, dasar goblok"],
    ),
    (
        "it",
        ["Domani andiamo in treno a trovare mia zia", "La mia amica musulmana lavora in ospedale"],
        ["Sei uno stupido idiota e non piaci a nessuno", "Stai zitto, brutto imbecille"],
    ),
    (
        "ja",
        ["明日は電車で叔母の家に行きます", "イスラム教徒の友人が病院で働いています"],
        ["お前はばかな間抜けで、誰にも好かれていない", "黙れ、このクズ野郎め"],
    ),
    (
        "ko",
        ["내일은 기차를 타고 이모 댁에 갑니다", "무슬림 친구가 병원에서 일하고 있어요"],
        ["너는 멍청한 바보 새끼야, 아무도 널 안 좋아해", "닥쳐, 이 병신 같은 놈아"],
    ),
    (
        "nl",
        ["Morgen gaan we met de trein naar mijn tante", "Mijn islamitische collega is vandaag jarig"],
        ["Je bent een domme idioot en niemand mag je", "Hou je bek, stomme sukkel"],
    ),
    (
        "pl",
        ["Jutro pojedziemy pociągiem do cioci na wieś", "Mój kolega jest gejem i uczy matematyki"],
        ["Jesteś głupim idiotą i nikt cię nie lubi", "Zamknij mordę, debilu"],
    ),
    (
        "pt",
        ["Amanhã vamos de ônibus para a casa da minha tia", "Minha amiga muçulmana trabalha no hospital"],
        ["Você é um idiota estúpido e ninguém gosta de você", "Cala a boca, seu imbecil nojento"],
    ),
    (
        "ru",
        ["Завтра мы поедем на поезде к моей тёте", "Моя подруга мусульманка работает в больнице"],
        ["Ты тупой идиот, и тебя никто не любит", "Заткнись, мерзкий урод"],
    ),
    (
        "sv",
        ["I morgon tar vi tåget till min moster", "Min muslimska arbetskamrat fyller år i dag"],
        ["Du är en dum idiot och ingen tycker om dig", "Håll käften, din äckliga jävel"],
    ),
    (
        "zh",
        ["明天我们坐火车去看望姑姑", "我的穆斯林朋友在医院工作"],
        ["你是个愚蠢的白痴，没有人喜欢你", "闭嘴，你这个恶心的混蛋"],
    ),
];

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    score: f32,
}

#[test]
fn scores_match_the_training_script() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../../tests/golden/lexical.json")).unwrap();
    assert!(cases.len() > 200);
    for case in cases {
        let score = Lexical::embedded().toxicity(&case.text, None);
        assert!((score - case.score).abs() < 1e-6, "{:?}: {score} is not {}", case.text, case.score);
    }
}

#[test]
fn benign_and_identity_lines_stay_under_the_threshold() {
    for (language, benign, _) in LINES {
        for text in benign {
            for hint in [None, Some(language)] {
                let score = Lexical::embedded().toxicity(text, hint);
                assert!(score < 0.5, "{language}: {text}: {score}");
            }
        }
    }
}

#[test]
fn mild_insults_reach_the_threshold() {
    for (language, _, mild) in LINES {
        for text in mild {
            for hint in [None, Some(language)] {
                let score = Lexical::embedded().toxicity(text, hint);
                assert!(score >= 0.5, "{language}: {text}: {score}");
            }
        }
    }
}

#[test]
fn case_and_punctuation_change_nothing() {
    for (_, benign, mild) in LINES {
        for text in benign.iter().chain(&mild) {
            let score = Lexical::embedded().toxicity(text, None);
            // Skip lines that do not survive upper case, such as those with ß.
            let loud = format!("«{}» !!!", text.to_uppercase());
            if text.to_uppercase().to_lowercase() == text.to_lowercase() {
                assert_eq!(score, Lexical::embedded().toxicity(&loud, None), "{text}");
            }
        }
    }
}

/// Inside long benign text an insult keeps 40% of its score, and benign text that is repeated many
/// times stays below the threshold.
#[test]
fn neutral_text_around_an_insult_does_not_hide_it() {
    let score = |text: &str| Lexical::embedded().toxicity(text, None);
    for (language, benign, mild) in LINES {
        let padding = benign.join(" ").repeat(8);
        let alone = score(mild[0]).max(score(mild[1]));
        let padded = mild.map(|insult| score(&format!("{padding} {insult} {padding}")));
        let padded = padded[0].max(padded[1]);
        assert!(padded > 0.4 * alone, "{language}: {padded} against {alone}");
        let long = score(&padding.repeat(4));
        assert!(long < 0.5, "{language}: {long}");
        println!("{language}: alone {alone:.2}, padded {padded:.2}, benign {long:.2}");
    }
}

#[test]
fn text_without_words_scores_zero() {
    for text in ["", " ", "\n\t", "…", "?!", "😀", "----", "***", "\u{200b}"] {
        assert_eq!(Lexical::embedded().toxicity(text, None), 0.0, "{text:?}");
    }
}

#[test]
fn code_numbers_and_other_languages_score_low() {
    for text in [
        "x",
        "字",
        "12345",
        "fn main() { let total = values.iter().sum::<u64>(); }",
        "https://example.org/path?query=1",
        "Yarın trenle teyzemin evine gideceğiz",
        "Αύριο θα πάμε με το τρένο στη θεία μου",
        "Ngày mai chúng tôi đi tàu đến nhà dì",
        "พรุ่งนี้เราจะไปบ้านป้าด้วยรถไฟ",
    ] {
        let score = Lexical::embedded().toxicity(text, None);
        assert!(score < 0.5, "{text}: {score}");
    }
}

#[test]
fn rejects_damaged_weights() {
    let whole = include_bytes!("../lexical.bin");
    assert_eq!(Lexical::from_bytes(&[]).unwrap_err(), WeightsError::Truncated(0));
    assert_eq!(Lexical::from_bytes(&whole[..HEADER - 1]).unwrap_err(), WeightsError::Truncated(HEADER - 1));
    assert!(matches!(
        Lexical::from_bytes(&whole[..whole.len() - 1]).unwrap_err(),
        WeightsError::Size { expected, found } if expected == found + 1
    ));
    let mut damaged = whole.to_vec();
    damaged[0] ^= 1;
    assert_eq!(Lexical::from_bytes(&damaged).unwrap_err(), WeightsError::Magic);
    for at in [9, 30, FIELDS, HEADER, whole.len() - 1] {
        let mut damaged = whole.to_vec();
        damaged[at] ^= 1;
        assert_eq!(Lexical::from_bytes(&damaged).unwrap_err(), WeightsError::Digest, "byte {at}");
    }
    let mut damaged = whole.to_vec();
    damaged[16] = 60;
    assert!(matches!(Lexical::from_bytes(&damaged).unwrap_err(), WeightsError::Header(_)));
}

#[test]
fn the_version_and_digest_of_the_weights_are_known() {
    let scorer = Lexical::embedded();
    assert!(!scorer.version().is_empty());
    assert_eq!(scorer.sha256().len(), 64);
}

/// `cargo test --release -- --ignored --nocapture throughput`
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let texts: Vec<String> =
        LINES.iter().map(|(_, benign, _)| benign.join(" ").chars().cycle().take(80).collect()).collect();
    let (rounds, start) = (20_000, std::time::Instant::now());
    let mut sum = 0.0;
    for _ in 0..rounds {
        for text in &texts {
            sum += Lexical::embedded().toxicity(std::hint::black_box(text), None);
        }
    }
    let rate = f64::from(rounds) * texts.len() as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} texts of 80 characters a second (sum {sum:.1})");
}
