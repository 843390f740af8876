"""Little words, by language: a text's tell its language, and a question's are not searched for."""

LANGUAGES = {
    "english": """a an the and or but if of to in on at by for with from as is are was were be been being am
        do does did done doing has have had having will would shall should can could may might must not no
        i you he she it we they me him her us them my your his its our their this that these those there
        here what which who whom whose when where why how than then so such into about also any some
        please tell explain describe name much many""",
    "german": """der die das den dem des ein eine einen einem einer eines und oder aber wenn von zu zum zur
        in im an am auf für mit aus bei nach als ist sind war waren sein wird werden wurde hat haben hatte
        kann können muss müssen soll darf nicht kein keine ich du er sie es wir ihr mich mir uns ihnen mein
        sein unser dieser diese dieses was welche welcher welches wer wen wem wessen wann wo warum wieso wie
        so auch bitte viel viele gibt man sich""",
    "french": """le la les un une des du de d l et ou mais si à au aux dans en sur par pour avec est sont
        était être a ont avait avoir peut peuvent doit ne pas non je tu il elle on nous vous ils elles me te
        se mon ma mes ton votre vos notre ce cet cette ces que qui quoi quel quelle quels quelles quand où
        pourquoi comment combien aussi plus y""",
    "spanish": """el la los las un una unos unas de del y o pero si a al en por para con es son era ser está
        están ha han hay tiene puede pueden debe no yo tú él ella nosotros ellos me te se mi su sus nuestro
        este esta estos estas ese esa lo que qué quién quiénes cuál cuáles cuándo dónde cómo cuánto cuántos
        cuántas más también como""",
    "italian": """il lo la i gli le un uno una di del della dei delle da dal in nel nella su per con e o ma
        se è sono era essere ha hanno può deve non io tu lui lei noi voi loro mi ti si mio suo questo questa
        questi che chi cosa quale quali quando dove perché come quanto quanti anche più al alla""",
    "portuguese": """o a os as um uma uns umas de do da dos das e ou mas se em no na nos nas por para com é
        são era ser está estão foi tem têm pode deve não eu você ele ela nós eles me te seu sua este esta
        isso que quem qual quais quando onde como quanto quantos mais também ao à pelo pela""",
    "dutch": """de het een en of maar als van te in op aan bij voor met uit naar is zijn was waren wordt
        worden heeft hebben kan kunnen moet mag niet geen ik jij je hij zij ze wij we jullie mij ons mijn
        dit dat deze die wat welke wie wanneer waar waarom hoe ook hoeveel er""",
    "swedish": """en ett den det de och eller men om av till i på vid för med från är var vara har hade kan
        ska måste inte ingen jag du han hon vi ni mig dig oss min din denna detta vad vilken vilket vilka
        vem när var varför hur också som finns""",
    "danish": """en et den det de og eller men hvis af til i på ved for med fra er var være har havde kan
        skal må ikke ingen jeg du han hun vi mig dig os min din denne dette hvad hvilken hvilket hvilke hvem
        hvornår hvor hvorfor hvordan også som der""",
    "norwegian": """en et ei den det de og eller men hvis av til i på ved for med fra er var være har hadde
        kan skal må ikke ingen jeg du han hun vi meg deg oss min din denne dette hva hvilken hvilket hvilke
        hvem når hvor hvorfor hvordan også som""",
    "finnish": """ja tai mutta jos on ovat oli olla ei eivät se ne hän he minä sinä me te tämä nämä tuo joka
        jotka mikä mitä mitkä kuka ketä milloin missä mistä mihin miksi miten kuinka myös että kun niin""",
    "polish": """i lub albo ale jeśli z ze do w we na o od po przez dla przy jest są był była było być ma
        mają może można musi nie ja ty on ona ono my wy oni się mój jego jej ich ten ta to te tego co kto
        jaki jaka jakie który która które kiedy gdzie dlaczego jak ile czy też""",
    "czech": """a nebo ale jestli z ze do v ve na o od po pro při je jsou byl byla bylo být má mají může
        musí ne já ty on ona my vy oni se můj jeho její ten ta to ty tento co kdo jaký jaká jaké který která
        které kdy kde proč jak kolik také že""",
    "romanian": """un o unei unui al ai ale și sau dar dacă de la în pe din cu pentru prin este sunt era fi
        are au poate trebuie nu eu tu el ea noi voi ei se meu său acest această aceste ce cine care când
        unde cum cât câte câți mai""",
    "hungarian": """a az egy és vagy de ha hogy nem is van vannak volt lesz lehet kell én te ő mi ti ők ez
        azt ezt mely amely aki ami ki mit mikor hol miért hogyan milyen melyik mennyi hány meg""",
    "turkish": """bir ve veya ya da ama eğer ile için gibi bu şu o ben sen biz siz onlar mı mi mu mü ne kim
        hangi nerede nereye zaman neden niçin nasıl kaç değil var yok olan olarak da de""",
    "indonesian": """dan atau tetapi jika dari ke di pada untuk dengan adalah ialah yang ini itu saya kamu
        anda dia kami kita mereka tidak bukan apa siapa kapan mana mengapa kenapa bagaimana berapa bisa
        dapat akan sudah juga""",
}
OTHER_STOP_WORDS = """
    и или но если в во на с со из к от до по для при о об у за не ни я ты он она оно мы вы они меня мне его её
    ее их это этот эта эти тот что чего кто кого какой какая какие каков когда где куда почему зачем как
    сколько ли бы же есть был была было быть
    та або але якщо що хто який яка які коли де чому як скільки чи є
    ο η το οι τα του της των και ή αν σε στο στη στην από με για είναι ήταν δεν τι
    ποιος ποια ποιο πότε πού γιατί πώς πόσο
    في من على إلى عن مع هو هي هم أن إن كان كانت ما ماذا من متى أين لماذا كيف كم هل أي هذا
    هذه التي الذي و أو لا
    का की के को में से पर और या है हैं था थी क्या कौन कब कहाँ क्यों कैसे कितना कितने यह वह
    של את על עם הוא היא הם זה זאת מה מי מתי איפה למה איך כמה האם
    은 는 이 가 을 를 의 에 에서 와 과 무엇 무엇입니까 무엇인가요 누구 언제 어디 왜 어떻게 몇
    什么 什麼 怎么 怎麼 如何 吗 嗎 的 是 了 何 どこ いつ だれ
"""

STOP_WORDS: dict[str, tuple[str, ...]] = dict.fromkeys(OTHER_STOP_WORDS.split(), ())
"""Every little word, with the languages of Latin script that have it."""
for _language, _words in LANGUAGES.items():
    for _word in _words.split():
        STOP_WORDS[_word] = (*STOP_WORDS.get(_word, ()), _language)

_QUESTION_WORDS = """
    what which who whom whose when where why how is are was were do does did can could should will would
    may was welche welcher welches wer wen wem wann wo warum wieso wie ist sind kann gibt darf que qui
    quoi quel quelle quels quelles quand où pourquoi comment combien est qué quién quiénes cuál cuáles
    cuándo dónde cómo cuánto cuántos cuántas hay che chi cosa quale quali quando dove perché come quanto
    quanti quem qual quais onde quantos wat welke wie wanneer waar waarom hoe vad vilken vilket vem när
    var varför hur hvad hvem hvornår hvor hvorfor hvordan hva når mikä mitä kuka milloin missä miksi
    miten kuinka co kto jaki jaka jakie kiedy gdzie dlaczego jak ile kdo jaký kdy kde proč kolik ce cine
    când unde cum cât ki mi mikor hol miért hogyan ne kim hangi nerede neden nasıl kaç apa siapa kapan
    mana mengapa bagaimana berapa что кто какой какая какие когда где куда почему зачем как сколько що
    хто який коли де чому скільки τι ποιος ποια πότε πού γιατί πώς πόσο ما ماذا من متى أين لماذا كيف كم
    هل क्या कौन कब कहाँ क्यों कैसे कितना מה מי מתי איפה למה איך כמה האם 무엇 누구 언제 어디 왜 어떻게
"""
QUESTION_WORDS = frozenset(_QUESTION_WORDS.split())
"""Words that a whole question has, and its mere end has not."""
