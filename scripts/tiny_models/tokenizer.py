"""A small byte-level BPE tokenizer, trained on a few sentences in each of 17 languages."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# 4 control tokens + 256 bytes + 124 merges. A multiple of 32, so that every matrix of the models can be
# quantised, and small, so that golden logits stay readable.
N_VOCAB = 384

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROL_TOKENS = [UNK, BOS, EOS, PAD]  # their ids are 0, 1, 2, 3

# Sentences written for this file. Words repeat on purpose, because a merge needs a pair that occurs twice.
CORPUS = {
    "ar": ["الطقس جميل اليوم في المدينة.", "القطة تنام في البيت.", "نحب الشاي في الصباح."],
    "cs": ["Dnes je ve městě hezké počasí.", "Kočka spí doma.", "Ráno máme rádi čaj."],
    "de": ["Das Wetter ist heute schön in der Stadt.", "Die Katze schläft im Haus.", "Wir trinken den Tee am Morgen."],
    "en": ["The weather is nice today in the city.", "The cat sleeps in the house.",
           "We like the tea in the morning.", "It's true that they're here and I'm there."],
    "es": ["El tiempo es bueno hoy en la ciudad.", "El gato duerme en la casa.", "Nos gusta el té por la mañana."],
    "fr": ["Le temps est beau aujourd'hui dans la ville.", "Le chat dort dans la maison.",
           "Nous aimons le thé le matin."],
    "hi": ["आज शहर में मौसम अच्छा है।", "बिल्ली घर में सोती है।", "हमें सुबह चाय पसंद है।"],
    "id": ["Cuaca di kota hari ini bagus.", "Kucing itu tidur di rumah.", "Kami suka minum teh di pagi hari."],
    "it": ["Il tempo è bello oggi nella città.", "Il gatto dorme nella casa.", "Ci piace il tè la mattina."],
    "ja": ["今日は町の天気がいいです。", "猫は家で寝ています。", "朝はお茶が好きです。"],
    "ko": ["오늘 도시의 날씨가 좋습니다.", "고양이는 집에서 잡니다.", "우리는 아침에 차를 좋아합니다."],
    "nl": ["Het weer is vandaag mooi in de stad.", "De kat slaapt in het huis.",
           "Wij houden van de thee in de ochtend."],
    "pl": ["Dzisiaj w mieście jest ładna pogoda.", "Kot śpi w domu.", "Rano lubimy pić herbatę."],
    "pt": ["O tempo está bom hoje na cidade.", "O gato dorme na casa.", "Gostamos do chá pela manhã."],
    "ru": ["Сегодня в городе хорошая погода.", "Кошка спит в доме.", "Утром мы любим пить чай."],
    "sv": ["Vädret är fint i staden i dag.", "Katten sover i huset.", "Vi tycker om te på morgonen."],
    "zh": ["今天城市的天气很好。", "猫在家里睡觉。", "我们早上喜欢喝茶。"],
}


def train() -> Tokenizer:
    """The tokenizer that all tiny models share. Its post-processor adds <s> if special tokens are requested."""
    tok = Tokenizer(models.BPE())
    # ByteLevel splits by GPT-2's regular expression, which llama.cpp calls "gpt-2".
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([sentence for sentences in CORPUS.values() for sentence in sentences], trainer)
    assert tok.get_vocab_size() == N_VOCAB, f"the corpus is too small: {tok.get_vocab_size()} tokens"
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tok.token_to_id(BOS))],
    )
    return tok


def to_json(tok: Tokenizer) -> str:
    """The tokenizer in Hugging Face's format, `tokenizer.json`."""
    return tok.to_str(pretty=True) + "\n"


def encode(tok: Tokenizer, text: str, add_bos: bool) -> list[int]:
    """Token ids of `text`, preceded by <s> if `add_bos`."""
    return tok.encode(text, add_special_tokens=add_bos).ids
